"""Where workers run: as processes of this host, or as actors of a Ray cluster."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from amoe.config import EngineConfig
from amoe.errors import ConfigError

ExecutorName = Literal["local", "ray"]
EXECUTORS: tuple[str, ...] = get_args(ExecutorName)
RAY_KEYWORDS = ("auto", "local")  # addresses that Ray itself makes something of


def split_ray_address(address: str) -> tuple[str, int]:
    """Host and port of a Ray head.

    Raises:
        ConfigError: it can be no such address.
    """
    if address.startswith("ray://"):
        raise ConfigError(
            f"--ray-address (RAY_ADDRESS) {address}: a Ray client is no part of the cluster, and workers could not "
            "reach the server: start it on a node of the cluster, with HOST:PORT of the head (usually port 6379)"
        )
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"--ray-address (RAY_ADDRESS) {address!r} is not HOST:PORT of a Ray head, as in 10.0.0.1:6379"
        )
    return host.strip("[]"), int(port)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutorOptions:
    """What starts the workers.

    Attributes:
        name: `local` or `ray`.
        ray_address: of the Ray cluster; None: `RAY_ADDRESS` says it, or `ray start` here, or a new local one.
        deployment: part of the actors' names, `amoe/<deployment>/<role>-<rank>`: unique in a Ray cluster.
        ray_pin_roles: workers go only to nodes that declare the custom resource `amoe_attention`, `amoe_experts` or
            `amoe_colocated`.
        ray_placement_timeout_s: so long may Ray look for room; where its autoscaler has to start nodes first, minutes.
    """

    name: ExecutorName = "local"
    ray_address: str | None = None
    deployment: str = "amoe"
    ray_pin_roles: bool = False
    ray_placement_timeout_s: float = 20.0

    def __post_init__(self) -> None:
        if self.name not in EXECUTORS:
            raise ConfigError(f"--executor must be one of {', '.join(EXECUTORS)}, not {self.name!r}")
        is_told_of_ray = self.ray_address is not None or self.ray_pin_roles or self.deployment != "amoe"
        if self.name == "local" and is_told_of_ray:
            raise ConfigError("--ray-address, --ray-pin-roles and --deployment-name go with --executor ray")
        if not 0 < self.ray_placement_timeout_s < float("inf"):
            raise ConfigError("--ray-placement-timeout must be greater than 0 seconds")
        if re.fullmatch(r"[A-Za-z0-9_.#-]{1,128}", self.deployment) is None:
            raise ConfigError(
                f"--deployment-name {self.deployment!r} must be 1 to 128 letters, digits, dots, dashes and underscores"
            )

    def check(self, config: EngineConfig, api_server_count: int) -> None:
        """Refuse what cannot work there.

        Raises:
            ConfigError: naming the flag.
        """
        if self.name == "local":
            return
        if config.transport == "shm":
            raise ConfigError("--executor ray: workers may be on different hosts: --transport tcp or distributed")
        if config.failure.warm_spare:
            raise ConfigError("--warm-spare keeps a process of this host, and --executor ray starts workers elsewhere")
        if config.cpu_sets:
            raise ConfigError("--cpu-bind names CPUs of this host, and --executor ray starts workers elsewhere")
        if api_server_count > 1:
            raise ConfigError("--executor ray goes with one API process: leave --api-server-count away")

    def check_address(self, environment: Mapping[str, str]) -> None:
        """Refuse an address that can be none, before the seconds that importing Ray takes.

        Raises:
            ConfigError: it can be none.
        """
        address = self.ray_address or environment.get("RAY_ADDRESS")
        if self.name == "ray" and address and address not in RAY_KEYWORDS:
            split_ray_address(address)

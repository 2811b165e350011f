"""Room for workers: one placement group per role, with a bundle for each worker.

Attention workers are packed: they talk to all expert workers, and to the server. Expert workers are spread: each then
has the memory bandwidth of a host to itself as far as there are hosts, and the loss of a host takes the fewest experts.
A worker that is added later has a group of its own, which is what Ray's autoscaler adds nodes for, and which is given
back with the worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from amoe.cluster.ray_cluster.names import claim
from amoe.cluster.ray_cluster.session import RaySession
from amoe.config import EngineConfig
from amoe.engine.roles import role_of
from amoe.errors import ConfigError

STRATEGIES = {"attention": "PACK", "colocated": "PACK", "experts": "SPREAD"}
PIN_AMOUNT = 0.001  # of a custom resource, so that a node that declares 1 of it takes as many workers as fit otherwise
_WAIT_STEP_S = 0.1
_SHORTAGE_TIMEOUT_S = 2.0
_SHOWN = ("CPU", "GPU")


def pin_of(role: str) -> str:
    """The custom resource of nodes that take workers of a role, where roles are pinned to nodes."""
    return f"amoe_{role}"


def needs_of(config: EngineConfig, role: str, num_threads: int, is_pinned: bool) -> dict[str, float]:
    """Resources of one worker."""
    needs = {"CPU": float(num_threads)}
    if config.device.startswith("cuda"):
        needs["GPU"] = 1.0
    return needs | ({pin_of(role): PIN_AMOUNT} if is_pinned else {})


def threads_for(free_cpus: Sequence[float], config: EngineConfig) -> int:
    """Threads of each worker: as configured, or as many as the nodes have processors free for all of them.

    Args:
        free_cpus: of each node.
    """
    if config.threads_per_worker is not None:
        return config.threads_per_worker
    count = config.placement.num_workers
    threads = 1  # if there is no room even for that, Ray may start nodes, or will say so
    while not config.device.startswith("cuda") and sum(cpus // (threads + 1) for cpus in free_cpus) >= count:
        threads += 1
    return threads


class Place(NamedTuple):
    """A bundle of a placement group."""

    group: PlacementGroup
    bundle: int


class Room:
    """The placement groups of a cluster.

    Args:
        needs: resources of a worker, by role.
        timeout_s: so long may Ray look for room.
    """

    def __init__(
        self,
        session: RaySession,
        config: EngineConfig,
        deployment: str,
        needs: Mapping[str, dict[str, float]],
        timeout_s: float,
    ) -> None:
        self._session = session
        self._config = config
        self._deployment = deployment
        self._needs = needs
        self._timeout_s = timeout_s
        self._places: dict[int, Place] = {}
        self._groups: list[PlacementGroup] = []

    async def reserve(self) -> None:
        """Find room for all workers of the start, or for none.

        Raises:
            ConfigError: there is too little, and the message says what is needed and what there is; or another server
                has this deployment's name.
        """
        by_role: dict[str, list[int]] = {}
        for rank in range(self._config.placement.num_workers):
            by_role.setdefault(role_of(self._config, rank), []).append(rank)
        reserving = [asyncio.ensure_future(self._reserve(role, ranks)) for role, ranks in by_role.items()]
        try:
            await asyncio.gather(*reserving)
        finally:
            for each in reserving:
                each.cancel()
            await asyncio.gather(*reserving, return_exceptions=True)

    async def place_of(self, rank: int) -> Place:
        """Where a worker is to be; for one that is added: look for room first.

        Raises:
            ConfigError: there is none.
        """
        if rank not in self._places:
            await self._reserve(role_of(self._config, rank), [rank])
        return self._places[rank]

    async def shortage(self, rank: int) -> str:
        """What a worker needs of a node, and what there is, for a person: its own node may have been lost, and Ray may
        not know of that yet."""
        import ray

        role = role_of(self._config, rank)
        kinds = [*_SHOWN, *(kind for kind in self._needs[role] if kind not in _SHOWN)]
        needs = f"it needs {_amounts(self._needs[role], kinds)}"
        try:
            async with asyncio.timeout(_SHORTAGE_TIMEOUT_S):
                nodes = await self._session.nodes()
                free = await self._session.thread.call(ray.available_resources)
        except TimeoutError:
            return f"{needs}, and the head of the Ray cluster does not answer"
        return (
            f"{needs}; Ray knows {len(nodes)} node(s), with {_amounts(free, kinds)} free, and takes a node that it "
            "does not hear from for lost after a while"
        )

    def leave(self, rank: int) -> None:
        """A worker has ended: the room of one that was added is given back, as soon as Ray takes it: its head may be
        away for a while, and nobody has to wait for that."""
        if rank >= self._config.placement.num_workers and (place := self._places.pop(rank, None)) is not None:
            self._groups.remove(place.group)
            self._session.thread.post(lambda: remove_placement_group(place.group))

    async def close(self) -> None:
        """Give all of it back. Idempotent."""
        groups, self._groups = self._groups, []
        self._places.clear()
        for group in groups:
            await self._session.tidy(remove_placement_group, group)

    async def _reserve(self, role: str, ranks: list[int]) -> None:
        bundles = [self._needs[role]] * len(ranks)
        name = f"amoe/{self._deployment}/{role}" + ("" if len(ranks) > 1 or ranks[0] == 0 else f"-{ranks[0]}")
        made: list[PlacementGroup] = []
        try:
            await claim(
                self._session.thread,
                lambda: made.append(placement_group(bundles, strategy=STRATEGIES[role], name=name)),
                f"a placement group {name}",
            )
            await self._until_there(made[0], role, len(ranks))
        except BaseException:
            # After the call above, in the same thread: whoever is cancelled in it does not know of the group yet.
            self._session.thread.post(lambda: [remove_placement_group(group) for group in made])
            raise
        self._groups.extend(made)
        for bundle, rank in enumerate(ranks):
            self._places[rank] = Place(made[0], bundle)

    async def _until_there(self, group: PlacementGroup, role: str, count: int) -> None:
        """Wait until Ray has found room.

        Raises:
            ConfigError: it has not within the timeout.
        """
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        while not await self._session.thread.call(group.wait, _WAIT_STEP_S):
            if asyncio.get_running_loop().time() > deadline:
                raise ConfigError(await self._complaint(role, count))

    async def _complaint(self, role: str, count: int) -> str:
        """What is needed, what there is, and what to do."""
        import ray

        nodes = await self._session.nodes()
        free = await self._session.thread.call(ray.available_resources)
        needs = self._needs[role]
        kinds = [*_SHOWN, *(kind for kind in needs if kind not in _SHOWN)]
        each = "; ".join(_amounts(node["Resources"], kinds) for node in nodes[:8])
        pin = pin_of(role)
        advice = (
            f"declare it where such workers may run, as in `ray start --resources='{{\"{pin}\": 1}}'`"
            if pin in needs and not any(pin in node["Resources"] for node in nodes)
            else "ask for fewer workers or fewer --threads-per-worker, or add nodes (where Ray's autoscaler adds them: "
            "raise --ray-placement-timeout)"
        )
        return (
            f"the Ray cluster has had no room for {count} {role} worker(s) of {_amounts(needs, kinds)} each within "
            f"{self._timeout_s:g} s: it has {len(nodes)} node(s) ({each}), with {_amounts(free, kinds)} free now: "
            f"{advice}"
        )


def _amounts(resources: Mapping[str, float], kinds: Sequence[str]) -> str:
    """`2 CPU, 0 GPU`: as needed, without those that nobody asks for."""
    shown = [f"{resources.get(kind, 0):g} {kind}" for kind in kinds if kind == "CPU" or resources.get(kind)]
    return ", ".join(shown)

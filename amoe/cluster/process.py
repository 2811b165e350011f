"""What a worker is told when it is started, and what it is called."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from amoe.config import EngineConfig, PlacementConfig
from amoe.logs import LogOptions
from amoe.transport.opening import TransportSpec

DEFAULT_ENTRY = "amoe.engine.build:build_worker"


class InheritedControl(msgspec.Struct, frozen=True, tag="inherited"):
    """The control channel is a socket that the worker has inherited.

    Attributes:
        fd: the worker's end.
        door_fd: its side of the door for API processes, see `amoe.engine.shared_control`; None: there is only one.
    """

    fd: int
    door_fd: int | None = None


class TcpControl(msgspec.Struct, frozen=True, tag="tcp"):
    """The worker connects to the server for its control channel: see `amoe.cluster.control_listener`.

    Attributes:
        host, port: where the server listens.
        token: the secret of this launch. A spec that holds one must not travel on a command line.
    """

    host: str
    port: int
    token: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchSpec:
    """All that a worker is told. It survives JSON.

    Attributes:
        entry: `module:function`; `build_worker(config, rank, transport, control)` returns an object with `run()`; a
            late worker's gets `rejoin=Rejoin(...)` as well.
        control: how it talks to the server.
        transport: how it talks to the other workers.
        incarnation: which life of this rank it is.
        is_late: others serve already; it waits for a `Topology` first.
        logs: how it logs.
    """

    config: EngineConfig
    rank: int
    entry: str = DEFAULT_ENTRY
    control: InheritedControl | TcpControl
    transport: TransportSpec
    incarnation: int = 0
    is_late: bool = False
    logs: LogOptions = field(default_factory=LogOptions)


def title_of(placement: PlacementConfig, rank: int) -> str:
    """The role as `ps` shows it: `attention 1`, `expert 0`, or `worker 0` for one that is both."""
    is_home, is_owner = rank in placement.attention_ranks, rank in placement.owner_ranks
    if is_home and is_owner:
        return f"worker {rank}"
    return f"attention {rank}" if is_home else f"expert {placement.owner_ranks.index(rank)}"

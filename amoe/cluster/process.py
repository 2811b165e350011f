"""What the parent tells a worker process, and what it calls it."""

from __future__ import annotations

from dataclasses import dataclass, field

from amoe.config import EngineConfig, PlacementConfig
from amoe.logs import LogOptions
from amoe.transport.shm import ShmSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchSpec:
    """All that a worker process is told, as JSON on its command line; the descriptors are inherited.

    Attributes:
        entry: `module:function`; `build_worker(config, rank, transport, control)` returns an object with `run()`.
        control_fd: the worker's end of its control socket.
        front_fds: ... of those to API processes, if there are several.
        shm: the transport's memory and doorbells.
        logs: how it logs.
    """

    config: EngineConfig
    rank: int
    entry: str
    control_fd: int
    shm: ShmSpec
    front_fds: tuple[int, ...] = ()
    logs: LogOptions = field(default_factory=LogOptions)


def title_of(placement: PlacementConfig, rank: int) -> str:
    """The role as `ps` shows it: `attention 1`, `expert 0`, or `worker 0` for one that is both."""
    is_home, is_owner = rank in placement.attention_ranks, rank in placement.expert_ranks
    if is_home and is_owner:
        return f"worker {rank}"
    return f"attention {rank}" if is_home else f"expert {placement.expert_ranks.index(rank)}"

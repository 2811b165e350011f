"""What those who keep workers alive, and move experts, need of whatever sends the workers requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from amoe.engine.channels import WorkerChannel
from amoe.engine.messages import Topology, ToServer
from amoe.metrics.cluster import LossKind


class ClusterCounters(Protocol):
    """What is counted of a cluster; see `amoe.metrics.EngineMetrics`."""

    def worker_lost(self, rank: int, role: str, kind: LossKind) -> None:
        """A worker is dead, and what it had under way with it."""
        ...

    def worker_back(self, rank: int, role: str, seconds: float) -> None:
        """A worker that was lost serves again, so long after its loss."""
        ...

    def worker_removed(self, rank: int) -> None:
        """A worker has left for good."""
        ...

    def experts_moved(self, count: int) -> None:
        """So many (layer, expert) copies were loaded by workers that serve."""
        ...


class SupervisedEngine(Protocol):
    """An engine that goes on when a worker is lost: an `AsyncEngine` made with `supervised`, or several of them in
    processes of their own, `amoe.cluster.front_ends.FrontEnds`.

    Attributes:
        on_message: called with the rank and every message of a worker but its outputs.
        on_gone: called with rank and reason when a channel to a worker has ended by itself.
        trouble: why the engine is unhealthy, as its supervisor sees it; "" if it is not.
        note: what is being done about a worker that has died.
        is_awaited: nothing can be served without that worker: whoever waits is not to blame.
    """

    on_message: Callable[[int, ToServer], None] | None
    on_gone: Callable[[int, str], None] | None
    trouble: str
    note: str
    is_awaited: bool

    @property
    def metrics(self) -> ClusterCounters: ...

    def on_topology(self, topology: Topology) -> None:
        """Another topology is in force."""
        ...

    def measured_load(self) -> npt.NDArray[np.float64] | None:
        """[num_layers, num_experts] pairs that have been computed lately; None: nobody knows yet."""
        ...

    def measured_speeds(self) -> npt.NDArray[np.float64]:
        """[num_owners] of the expert workers, relative to their median; 1 where nothing is known."""
        ...

    def attach(self, rank: int, channel: WorkerChannel) -> None:
        """A worker has come: requests may go there from the next turn of the event loop on."""
        ...

    async def lose(self, rank: int, reason: str) -> None:
        """A worker is gone for good: its open sequences go on at others, or wait for one to come."""
        ...

    def die(self, reason: str) -> None:
        """Nothing can go on."""
        ...

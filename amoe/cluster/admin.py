"""What an operator may ask of a running cluster; the HTTP admin API and `amoe scale` speak to this."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

WorkerState = Literal["starting", "serving", "draining", "lost", "waiting"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerStatus:
    """One worker, or the place of one.

    Attributes:
        rank, title, role: who it is; `role` is "attention", "experts" or "colocated".
        state: `waiting`: it has died, and is started anew after a pause.
        incarnation: which life it is in, or was.
        num_crashes: deaths in a row.
        reason: how it died last; "" if it never did.
        retry_s: seconds until it is started anew, while `waiting`.
    """

    rank: int
    title: str
    role: str
    state: WorkerState
    incarnation: int = 0
    num_crashes: int = 0
    reason: str = ""
    retry_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterStatus:
    """The cluster, now.

    Attributes:
        version: of the topology.
        workers: by rank, those that there are or ought to be.
        num_expert_workers, max_expert_workers: that there ought to be, and may be.
        num_experts, num_layers: of the model.
        num_replicas: (layer, expert) pairs beyond one each.
        missing: (layer, expert) pairs that nobody holds at the moment.
        action: what the cluster is at, for a person: "moving 3 of 12 experts"; "" if nothing.
    """

    version: int
    workers: list[WorkerStatus] = field(default_factory=list)
    num_expert_workers: int = 0
    max_expert_workers: int = 0
    num_layers: int = 0
    num_experts: int = 0
    num_replicas: int = 0
    missing: int = 0
    action: str = ""


class ClusterAdmin(Protocol):
    """All methods return when it is done: traffic goes on meanwhile. One action at a time; the next one waits.

    Raises:
        ConfigError: it cannot be done; the message says why, and what to do.
        UnfinishedError: it began, and came to nothing or to half; the message says what is true now.
    """

    def status(self) -> ClusterStatus:
        """Now; does not wait."""
        ...

    async def scale_experts(self, count: int) -> ClusterStatus:
        """Let there be `count` expert workers: start some and give them their share of the experts, or move the experts
        of those with the greatest ranks to the others, drain and stop them."""
        ...

    async def replicate(self, layer: int, expert: int, count: int) -> ClusterStatus:
        """Let `count` expert workers hold this expert."""
        ...

    async def rebalance(self) -> ClusterStatus:
        """Place experts, and as many replicas as there are, by the load that has been measured lately."""
        ...

"""What an operator may ask of a running cluster; the HTTP admin API and `amoe scale` speak to this."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import msgspec

WorkerState = Literal["starting", "serving", "draining", "lost", "waiting"]
ActionState = Literal["running", "done", "refused", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerStatus:
    """One worker, or the place of one.

    Attributes:
        rank, title, role: who it is; `role` is "attention", "experts" or "colocated".
        state: `waiting`: it has died, and is started anew after a pause.
        incarnation: which life of this rank it is in, or was: workers that have been removed count as well.
        lives: of this worker, since it was added.
        num_crashes: deaths in a row.
        reason: how it died last; "" if it never did.
        retry_s: seconds until it is started anew, while `waiting`.
        ended_s: seconds since it was lost last; None: it never was.
    """

    rank: int
    title: str
    role: str
    state: WorkerState
    incarnation: int = 0
    lives: int = 1
    num_crashes: int = 0
    reason: str = ""
    retry_s: float = 0.0
    ended_s: float | None = None


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


class Scale(msgspec.Struct, frozen=True, tag=True):
    """Order: `ClusterAdmin.scale_experts`."""

    count: int

    def __str__(self) -> str:
        return f"scale to {_workers(self.count, 'expert ')}"

    async def carry_out(self, admin: ClusterAdmin) -> None:
        """Until it is done."""
        await admin.scale_experts(self.count)


class Replicate(msgspec.Struct, frozen=True, tag=True):
    """Order: `ClusterAdmin.replicate`."""

    layer: int
    expert: int
    count: int

    def __str__(self) -> str:
        return f"hold expert {self.expert} of layer {self.layer} at {_workers(self.count)}"

    async def carry_out(self, admin: ClusterAdmin) -> None:
        """Until it is done."""
        await admin.replicate(self.layer, self.expert, self.count)


class Rebalance(msgspec.Struct, frozen=True, tag=True):
    """Order: `ClusterAdmin.rebalance`."""

    def __str__(self) -> str:
        return "rebalance"

    async def carry_out(self, admin: ClusterAdmin) -> None:
        """Until it is done."""
        await admin.rebalance()


Order = Scale | Replicate | Rebalance


def _workers(count: int, kind: str = "") -> str:
    return f"{count} {kind}worker{'' if count == 1 else 's'}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ActionStatus:
    """What has become of an order.

    Attributes:
        id: counts up from 1.
        action: for a person: `scale to 3 expert workers`.
        state: `refused`: it could not be done, and nothing is wrong with the server.
        seconds: that it has taken so far, or took.
        error: why it failed; "" if it did not.
    """

    id: int
    action: str
    state: ActionState
    seconds: float
    error: str


@dataclass(frozen=True, kw_only=True, slots=True)
class AdminView:
    """The cluster, and the last orders, oldest first."""

    status: ClusterStatus
    actions: list[ActionStatus]


class AdminDesk(Protocol):
    """Where operators' orders are taken, wherever the workers are supervised: in this process or in its parent."""

    async def look(self) -> AdminView:
        """How the cluster is now."""
        ...

    async def order(self, order: Order, *, wait: bool) -> int:
        """Begin an order, which goes on whether whoever has given it waits or not; the cluster does one at a time.

        Args:
            wait: until it is done.

        Returns:
            The id of the action.

        Raises:
            ConfigError, UnfinishedError: see `ClusterAdmin`; only with `wait`.
        """
        ...

"""What the process that supervises the workers, the parent, and an API process in front of them say to each other."""

from __future__ import annotations

import msgspec

from amoe.cluster.admin import AdminView, Order
from amoe.metrics.cluster import LossKind
from amoe.stats import SteeringStats, WorkerStats


class PastLives(msgspec.Struct, frozen=True, tag=True):
    """Parent, first of all: what workers have counted in lives that are over, by rank, see `WorkerLives`."""

    stats: dict[int, WorkerStats]


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Parent: say `Pong`."""


class Serve(msgspec.Struct, frozen=True, tag=True):
    """Parent: all that is so at the start has been told; listen to users."""


class Attach(msgspec.Struct, frozen=True, tag=True):
    """Parent: a worker is there, in this life. With it comes the socket to it."""

    rank: int
    incarnation: int


class Lose(msgspec.Struct, frozen=True, tag=True):
    """Parent: a worker is gone for good: hear its last words, and let its sequences go on elsewhere."""

    rank: int
    reason: str


class Health(msgspec.Struct, frozen=True, tag=True):
    """Parent: `trouble`, `note` and `is_awaited` of the engine, see `AsyncEngine`."""

    trouble: str
    note: str
    is_awaited: bool = False


class Die(msgspec.Struct, frozen=True, tag=True):
    """Parent: nothing can go on."""

    reason: str


class Steered(msgspec.Struct, frozen=True, tag=True):
    """Parent: what is in force by which it steers the workers."""

    state: SteeringStats


class LifeEnded(msgspec.Struct, frozen=True, tag=True):
    """Parent: a worker is dead, and what it had under way with it."""

    rank: int


class LifeBegun(msgspec.Struct, frozen=True, tag=True):
    """Parent: a worker that was lost serves again."""

    rank: int


class WorkerLost(msgspec.Struct, frozen=True, tag=True):
    """Parent, to one API process alone: count it, see `EngineMetrics.count_loss`."""

    rank: int
    role: str
    kind: LossKind


class WorkerBack(msgspec.Struct, frozen=True, tag=True):
    """Parent, to one API process alone: count it, see `EngineMetrics.count_return`."""

    rank: int
    role: str
    seconds: float


class WorkerRemoved(msgspec.Struct, frozen=True, tag=True):
    """Parent: see `EngineMetrics.worker_removed`."""

    rank: int


class ExpertsMoved(msgspec.Struct, frozen=True, tag=True):
    """Parent, to one API process alone: count it, see `EngineMetrics.experts_moved`."""

    count: int


class Answer(msgspec.Struct, frozen=True, tag=True):
    """Parent: what `Ask` number `number` has brought: `view`, the number of an `action`, or an error.

    Attributes:
        error: name of its class; "" if there is none, or nobody has to know.
        message: of the error; "" if there is none.
    """

    number: int
    view: AdminView | None = None
    action: int = 0
    error: str = ""
    message: str = ""


class Ask(msgspec.Struct, frozen=True, tag=True):
    """API process: see to an order of an operator's; None: how is the cluster? `wait`: answer when it is done."""

    number: int
    order: Order | None
    wait: bool = True


class Pong(msgspec.Struct, frozen=True, tag=True):
    """API process: it hears what its parent says."""


class Listening(msgspec.Struct, frozen=True, tag=True):
    """API process: users can be served."""


class Gone(msgspec.Struct, frozen=True, tag=True):
    """API process: its channel to this life of a worker has ended by itself."""

    rank: int
    incarnation: int
    reason: str


ToFront = (
    PastLives
    | Ping
    | Serve
    | Attach
    | Lose
    | Health
    | Die
    | Steered
    | LifeEnded
    | LifeBegun
    | WorkerLost
    | WorkerBack
    | WorkerRemoved
    | ExpertsMoved
    | Answer
)
ToParent = Ask | Pong | Listening | Gone

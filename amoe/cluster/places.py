"""The places of a cluster's workers: who is there, in which life, and what has happened to the lives before."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from amoe.cluster.admin import WorkerState, WorkerStatus
from amoe.cluster.launcher import WorkerHandle
from amoe.policy.supervision import Crashes

TRUST_S = 10.0  # a worker that has died again and again is no trouble any more once it has served for so long


@dataclass(slots=True)
class Place:
    """One rank. Times are a monotonic clock's.

    Attributes:
        rank, title, role: see `WorkerStatus`.
        crashes: its deaths in a row.
        worker: its present life; None: there is none.
        state: see `WorkerStatus`.
        incarnation: of the present life, or of the last; first_incarnation: of the first, since it was added.
        since: when the present life began to serve.
        lost_at: when service ended; None: it never has.
        reason: of the last death, for a person.
        last_words: what it has said of its own failure.
        retry_at: when the next life begins, while `waiting`.
        successor: the task that starts the next life, or buries the last one.
        burial: held while the last life is buried.
    """

    rank: int
    title: str
    role: str
    crashes: Crashes
    worker: WorkerHandle | None = None
    state: WorkerState = "starting"
    incarnation: int = 0
    first_incarnation: int = 0
    since: float = 0.0
    lost_at: float | None = None
    reason: str = ""
    last_words: str = ""
    retry_at: float = 0.0
    successor: asyncio.Task[None] | None = field(default=None, repr=False)
    burial: asyncio.Lock = field(default_factory=asyncio.Lock, repr=False)

    def serve(self, worker: WorkerHandle, now: float) -> None:
        """A life has begun."""
        self.worker, self.incarnation = worker, worker.incarnation
        self.state, self.since, self.last_words = "serving", now, ""

    def fall(self, reason: str, now: float) -> None:
        """A life has ended, or could not begin."""
        has_served = self.state in ("serving", "draining")
        self.crashes = self.crashes.after(now - self.since if has_served else 0.0)
        if has_served or self.lost_at is None:
            self.lost_at = now
        self.state, self.reason = "lost", reason

    def forgive(self, now: float) -> None:
        """A life that has lasted makes up for those before."""
        if self.state == "serving" and now - self.since >= self.crashes.max_backoff_s:
            self.crashes = self.crashes.forgiven()

    def trouble(self, max_crashes: int, now: float) -> str:
        """Why the server is not healthy for it; "" if it is."""
        if self.crashes.count < max_crashes or (self.state == "serving" and now - self.since >= TRUST_S):
            return ""
        what_next = {
            "waiting": f"next attempt in {max(0.0, self.retry_at - now):.0f} s",
            "serving": "it serves again, for now",
        }.get(self.state, "it is being started anew")
        return f"{self.title} has died {self.crashes.count} times in a row, last: {self.reason}; {what_next}"

    @property
    def note(self) -> str:
        """What is being done about it; "" if nothing is."""
        is_missing = self.lost_at is not None and self.state in ("lost", "waiting", "starting")
        return f"{self.title} has died and is being replaced" if is_missing else ""

    def status(self, now: float) -> WorkerStatus:
        """For an operator."""
        return WorkerStatus(
            rank=self.rank,
            title=self.title,
            role=self.role,
            state=self.state,
            incarnation=self.incarnation,
            lives=max(1, self.incarnation - self.first_incarnation + 1),
            num_crashes=self.crashes.count,
            reason=self.reason,
            retry_s=max(0.0, self.retry_at - now) if self.state == "waiting" else 0.0,
            ended_s=None if self.lost_at is None else now - self.lost_at,
        )

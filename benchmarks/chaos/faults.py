"""What goes wrong in a run, and when: counted in tokens, so that a fast machine and a slow one suffer the same."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

FaultKind = Literal["kill", "stop", "hang", "cut", "delay"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One fault, of one worker or of several at once.

    Attributes:
        kind: `kill`: SIGKILL; `stop`: SIGSTOP; `hang`: its loop stays inside its next step for ever, the process lives;
            `cut`: the worker and all others hear nothing of each other; `delay`: they hear everything later.
        workers: their titles, as `ps` shows them: `expert 0`.
        at: the share of the run's tokens that have come by then.
        seconds: how long a link is cut, or delayed; inf: until the server has noticed it.
        delay_s: by how much.
    """

    kind: FaultKind
    workers: tuple[str, ...]
    at: float = 0.3
    seconds: float = 3.0
    delay_s: float = 0.05

    def __str__(self) -> str:
        who = " and ".join(self.workers)
        if self.kind == "kill":
            return f"kill -9 {who}"
        if self.kind == "stop":
            return f"SIGSTOP {who}"
        if self.kind == "hang":
            return f"hang {who} inside a step"
        if self.kind == "cut":
            return f"cut {who} off " + (f"for {self.seconds:g} s" if self.seconds < inf else "until that is noticed")
        return f"delay all to and from {who} by {1e3 * self.delay_s:g} ms for {self.seconds:g} s"

    @property
    def ends_life(self) -> bool:
        """The worker cannot go on: another one has to come in its place."""
        return self.kind in ("kill", "stop", "hang")

    @property
    def may_end_life(self) -> bool:
        """The server may take the worker for dead."""
        return self.kind != "delay"


@dataclass(slots=True)
class Incident:
    """A fault that has happened. Times are monotonic seconds.

    Attributes:
        began: when it was done.
        healed: when all workers served again; None: they did not within the run and a while.
        noticed: when the server had taken all workers that were hurt for dead; None: it has not.
    """

    fault: Fault
    began: float
    healed: float | None = None
    noticed: float | None = None

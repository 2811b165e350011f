"""Do the workers make progress? Pure bookkeeping over their signs of life; the caller says how much time has passed.

A worker gives two signs. Its loop sends a *heartbeat* between two steps, twice a second, and says in between that it
turns. A thread beside the loop sends a *pulse* while the loop is inside one turn for longer than that should take, and
says for how long, and how long a step of that size usually takes. From these, four cases are told apart:

- *stopped*: neither sign. All threads of a process stop with it (SIGSTOP, a frozen container, a machine that is gone),
  and nothing that a worker computes stops the thread: kernels and waits release Python's lock. So a short silence of
  both is proof enough, and load, which slows steps, does not cause it.
- *hung inside a step*: pulses, but no heartbeat. A long step is not a hang: a huge prefill on a slow processor may
  take its time. It may take several times what the tokens so far have taken on average, and never is it suspected
  before the stall timeout; the first step of its kind, which may compile a kernel, has no average and gets a minute.
  Where a step goes through all layers, this holds of each of them, not of the step.
- *turning without progress*: heartbeats, but no block runs although tokens or sequences wait, for an answer that never
  comes. Whoever waits for a worker in one of the first two cases, or in a step that is long but allowed, is only its
  victim, and not counted.
- *dead*: no heartbeat for the heartbeat timeout, and no layer of a step that has ended in that time, whatever else the
  thread says. The others may end; this is final.

A process that ends is noticed at once, by whoever has started it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from amoe.policy.patience import STALL_TIMEOUT_S as STALL_TIMEOUT_S
from amoe.policy.patience import step_limit_s
from amoe.stats import WorkerStats

HEARTBEAT_TIMEOUT_S = 120.0

StallKind = Literal["silent", "in a step", "without a step"]


@dataclass(frozen=True, slots=True)
class Stall:
    """A worker that makes no progress, and how that shows."""

    rank: int
    kind: StallKind
    seconds: float

    def __str__(self) -> str:
        how = {
            "silent": "gives no sign of life",
            "in a step": "is inside one step",
            "without a step": "has work but runs no block",
        }
        return f"worker {self.rank} {how[self.kind]} for {self.seconds:.1f} s"


@dataclass(slots=True)
class _Worker:
    """Seconds since the last sign, since the last heartbeat, and of work without a step; and the step it is in."""

    silence_s: float = 0.0
    no_heartbeat_s: float = 0.0
    idle_s: float = 0.0
    step_s: float = 0.0
    step_limit_s: float = 0.0
    steps: int = -1
    has_work: bool = False


class Watchdog:
    """Counts seconds, see above.

    Args:
        heartbeat_timeout_s: a loop that has not turned for so long is dead.
        stall_timeout_s: silence, or work without a step, of so long is a stall, which may end.
    """

    def __init__(
        self,
        ranks: Iterable[int],
        heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S,
        stall_timeout_s: float = STALL_TIMEOUT_S,
    ) -> None:
        self.heartbeat_timeout_s = heartbeat_timeout_s
        self.stall_timeout_s = stall_timeout_s
        self._workers = {rank: _Worker() for rank in ranks}

    def forget(self, rank: int) -> None:
        """A worker is gone: nothing is expected of it. Nothing happens if it was not here."""
        self._workers.pop(rank, None)

    def expect(self, rank: int) -> None:
        """A worker has come, or come back. Whoever may have waited for it has its full time again."""
        self._workers[rank] = _Worker()
        for worker in self._workers.values():
            worker.idle_s = 0.0

    def beat(self, rank: int, stats: WorkerStats) -> None:
        """A heartbeat has come: the loop turns."""
        self.turned(rank)
        worker = self._workers[rank]
        worker.has_work = stats.num_running + stats.num_waiting > 0 or any(queue.depth for queue in stats.queues)
        if not worker.has_work or stats.steps != worker.steps:
            worker.idle_s = 0.0
        worker.steps = stats.steps

    def turned(self, rank: int) -> None:
        """The loop turns: a sign of it between two heartbeats."""
        worker = self._workers[rank]
        worker.silence_s = worker.no_heartbeat_s = worker.step_s = 0.0

    def pulse(self, rank: int, step_s: float, usual_s: float | None) -> None:
        """A pulse has come: the loop is `step_s` seconds into a step, or a layer of one, that usually takes `usual_s`.

        So it has turned, or got a layer further, `step_s` seconds ago.
        """
        worker = self._workers[rank]
        worker.silence_s = worker.idle_s = 0.0
        worker.no_heartbeat_s = min(worker.no_heartbeat_s, step_s)
        worker.step_s = step_s
        worker.step_limit_s = step_limit_s(usual_s, self.stall_timeout_s)

    def advance(self, seconds: float, *, is_somebody_missing: bool = False) -> None:
        """So much time has passed, in which a worker was missing that the others may wait for, or none was."""
        somebody_is_late = is_somebody_missing or any(w.silence_s >= 1.0 or w.step_s for w in self._workers.values())
        for worker in self._workers.values():
            worker.silence_s += seconds
            worker.no_heartbeat_s += seconds
            if worker.has_work and not somebody_is_late:
                worker.idle_s += seconds

    @property
    def silent(self) -> int | None:
        """A worker whose loop has not turned, nor got a layer further, for `heartbeat_timeout_s`."""
        limit = self.heartbeat_timeout_s
        return next((rank for rank, worker in self._workers.items() if worker.no_heartbeat_s >= limit), None)

    @property
    def stalled(self) -> Stall | None:
        """A worker that makes no progress: one that is the cause before one that may only suffer."""
        limit = self.stall_timeout_s
        stalls = [
            *(Stall(rank, "silent", w.silence_s) for rank, w in self._workers.items() if w.silence_s >= limit),
            *(Stall(r, "in a step", w.step_s) for r, w in self._workers.items() if 0 < w.step_limit_s <= w.step_s),
            *(Stall(rank, "without a step", w.idle_s) for rank, w in self._workers.items() if w.idle_s >= limit),
        ]
        return stalls[0] if stalls else None

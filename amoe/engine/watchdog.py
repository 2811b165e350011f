"""Do the workers make progress? Pure bookkeeping over heartbeats; the caller says how much time has passed."""

from __future__ import annotations

from collections.abc import Iterable

from amoe.stats import WorkerStats


class Watchdog:
    """Counts, for every worker, the seconds without a heartbeat and the seconds of work without a step.

    A heartbeat comes from within the worker's loop, so that silence means a loop that hangs, or a very long step. A
    loop that turns but runs no block although tokens or sequences wait (an answer that never comes) makes no progress
    either. Both are a stall, which may end; silence that lasts is taken as death. A process that ends is noticed at
    once, by whoever has started it.
    """

    def __init__(self, ranks: Iterable[int], heartbeat_timeout_s: float, stall_timeout_s: float) -> None:
        self.heartbeat_timeout_s = heartbeat_timeout_s
        self.stall_timeout_s = stall_timeout_s
        self._silence = dict.fromkeys(ranks, 0.0)
        self._idle = dict.fromkeys(self._silence, 0.0)
        self._steps: dict[int, int] = {}
        self._has_work = dict.fromkeys(self._silence, False)

    def beat(self, rank: int, stats: WorkerStats) -> None:
        """A heartbeat has come."""
        self._silence[rank] = 0.0
        has_work = stats.num_running + stats.num_waiting > 0 or any(queue.depth for queue in stats.queues)
        if not has_work or stats.steps != self._steps.get(rank):
            self._idle[rank] = 0.0
        self._has_work[rank] = has_work
        self._steps[rank] = stats.steps

    def advance(self, seconds: float) -> None:
        """So much time has passed."""
        for rank in self._silence:
            self._silence[rank] += seconds
            if self._has_work[rank]:
                self._idle[rank] += seconds

    @property
    def silent(self) -> int | None:
        """A worker without a heartbeat for `heartbeat_timeout_s`."""
        return next((rank for rank, s in self._silence.items() if s >= self.heartbeat_timeout_s), None)

    @property
    def stalled(self) -> int | None:
        """A worker that for `stall_timeout_s` has said nothing, or has had work but run no block."""
        idle, silence, limit = self._idle, self._silence, self.stall_timeout_s
        return next((rank for rank in silence if max(idle[rank], silence[rank]) >= limit), None)

"""Tells a watchdog how time passes, and the log what it sees."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from amoe.clock import Clock
from amoe.engine.watchdog import Stall, Watchdog

logger = logging.getLogger(__name__)

WATCHDOG_PERIOD_S = 0.5


class Vigil:
    """Keeps watch every half a second.

    Args:
        somebody_is_missing: a worker is being replaced, so that others may wait for it.
        each_turn: called with the time, and by how many seconds this turn came too late.
    """

    def __init__(
        self,
        watchdog: Watchdog,
        clock: Clock,
        *,
        somebody_is_missing: Callable[[], bool],
        each_turn: Callable[[float, float], None],
    ) -> None:
        self._watchdog = watchdog
        self._clock = clock
        self._somebody_is_missing = somebody_is_missing
        self._each_turn = each_turn
        self._reported: Stall | None = None

    async def run(self) -> None:
        """Until cancelled."""
        last = self._clock.now()
        while True:
            await asyncio.sleep(WATCHDOG_PERIOD_S)
            now = self._clock.now()
            # Time in which this process did not run (a suspended machine, a busy loop) says nothing about the workers,
            # whose messages lie unread: count a period for two at most.
            seconds = min(now - last, 2 * WATCHDOG_PERIOD_S)
            self._watchdog.advance(seconds, is_somebody_missing=self._somebody_is_missing())
            self._report(self._watchdog.stalled)
            self._each_turn(now, now - last - WATCHDOG_PERIOD_S)
            last = now

    def _report(self, stall: Stall | None) -> None:
        """Log what has changed, once for each worker and kind of stall."""
        reported, self._reported = self._reported, stall
        if stall is None:
            if reported is not None:
                logger.warning("all workers make progress again: healthy")
        elif reported is None or (stall.rank, stall.kind) != (reported.rank, reported.kind):
            logger.error("%s: not healthy", stall)

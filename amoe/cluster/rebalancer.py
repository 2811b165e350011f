"""What a placement needs without anybody asking: experts for who has lost all of them, and a rebalance now and then."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable

from amoe.cluster.placement_manager import PlacementManager
from amoe.errors import ConfigError

logger = logging.getLogger(__name__)

MISSING_S = 60.0  # so long experts are held by nobody before somebody is told what to do about it


class Rebalancer:
    """Runs beside what operators ask for.

    Args:
        interval_s: between two rebalances; 0: nobody wants any.
    """

    def __init__(self, manager: PlacementManager, interval_s: float) -> None:
        self._manager = manager
        self._interval_s = interval_s
        self._missing_since: float | None = None
        self._is_told = False

    async def run(self) -> None:
        """Until cancelled. Whatever goes wrong is told, and tried again at the next occasion."""
        now = asyncio.get_running_loop().time
        due = self._next(now())
        while True:
            look_at = self._tell_missing_at(now())
            try:
                async with asyncio.timeout_at(min(due, look_at)):
                    await self._manager.stirred.wait()
            except TimeoutError:
                if now() >= due:
                    await self._try(self._manager.rebalance_if_worth_it())
                    due = self._next(now())
            else:
                self._manager.stirred.clear()  # before the work: who comes meanwhile must not be missed
                await self._try(self._manager.employ_idle())

    def _next(self, now: float) -> float:
        return now + self._interval_s if self._interval_s else float("inf")

    async def _try(self, work: Awaitable[None]) -> None:
        try:
            await work
        except ConfigError as error:
            logger.warning("experts stay where they are: %s", error)
        except Exception:
            logger.exception("experts stay where they are")

    def _tell_missing_at(self, now: float) -> float:
        """Tell, once, of experts that nobody has held for long; when to look again, if ever."""
        if not (missing := self._manager.missing):
            self._missing_since, self._is_told = None, False
            return float("inf")
        since = self._missing_since = now if self._missing_since is None else self._missing_since
        if self._is_told or now < since + MISSING_S:
            return float("inf") if self._is_told else since + MISSING_S
        self._is_told = True
        logger.error(
            "%d experts have been held by nobody for %d s, and tokens wait for them: if their worker does not come "
            "back, `amoe scale --rebalance` places them at the workers that are there",
            missing,
            now - since,
        )
        return float("inf")

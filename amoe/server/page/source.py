"""Where `GET /live` gets its answer: computed at most once per second, however many people watch."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, TypedDict

from amoe import __version__
from amoe.clock import Clock, MonotonicClock
from amoe.cluster.admin import ClusterStatus
from amoe.engine.async_engine import AsyncEngine
from amoe.server.context import ServerContext
from amoe.server.encoding import json_bytes
from amoe.server.page.snapshot import Snapshot, Totals
from amoe.server.page.view import live_view
from amoe.stats import FlowSample, WorkerStats

CACHE_S = 0.9  # a page asks once per second
WINDOW_S = 5.0  # rates are over the last seconds
FORGET_S = 30.0  # a moment so long ago says nothing about now


class _Moment(TypedDict):
    """The fields of a `Snapshot` that cost nothing."""

    at_s: float
    workers: dict[int, WorkerStats]
    silent_s: dict[int, float]
    flow: list[FlowSample]
    num_open: int
    is_healthy: bool
    word: str
    cluster: ClusterStatus | None


class LiveSource:
    """Looks at the engine when asked to, and remembers what it saw for some seconds.

    Nobody watches: nothing is computed, and the first answer has no rates yet.
    """

    def __init__(self, context: ServerContext, clock: Clock | None = None) -> None:
        self._engine = context.engine
        self._admin = context.admin
        self._clock = clock or MonotonicClock()
        self._about = _describe(context)
        self._seen: deque[Snapshot] = deque()
        self._changed_at: dict[int, tuple[float, float]] = {}
        self._answer: tuple[float, bytes] | None = None
        self._lock = asyncio.Lock()

    async def read(self) -> bytes:
        """JSON of the view; at most `CACHE_S` old."""
        async with self._lock:
            now = self._clock.now()
            if self._answer is None or now - self._answer[0] >= CACHE_S:
                moment = self._look(now, None if self._admin is None else (await self._admin.look()).status)
                # 60 layers of 256 experts at 64 workers take tens of milliseconds: not in the event loop's time.
                self._answer = (now, await asyncio.to_thread(self._compute, moment))
            return self._answer[1]

    def _look(self, now: float, cluster: ClusterStatus | None) -> _Moment:
        """What the engine knows. Another thread may read it: what a worker said is replaced, never changed."""
        metrics = self._engine.metrics
        workers = dict(metrics.workers)
        for rank, stats in workers.items():
            if self._changed_at.get(rank, (-1.0, 0.0))[0] != stats.at_s:
                self._changed_at[rank] = (stats.at_s, now)
        return _Moment(
            at_s=now,
            workers=workers,
            silent_s={rank: now - self._changed_at[rank][1] for rank in workers},
            flow=[*metrics.flow.samples, metrics.flow.now(now)],
            num_open=self._engine.num_open,
            is_healthy=self._engine.healthy,
            word=self._engine.complaint or self._engine.note,
            cluster=cluster,
        )

    def _compute(self, moment: _Moment) -> bytes:
        """One at a time: the caller holds the lock."""
        current = Snapshot(totals=Totals.of(list(moment["workers"].values())), **moment)
        while self._seen and self._is_over(current.at_s):
            self._seen.popleft()
        previous = self._seen[0] if self._seen else None
        self._seen.append(current)
        return json_bytes(self._about | live_view(previous, current))

    def _is_over(self, now: float) -> bool:
        """The oldest moment is too old, or the one after it is old enough to compare with."""
        is_spare = len(self._seen) > 1 and now - self._seen[1].at_s >= WINDOW_S
        return is_spare or now - self._seen[0].at_s > FORGET_S


def _describe(context: ServerContext) -> dict[str, Any]:
    """What does not change while the server lives."""
    engine: AsyncEngine = context.engine
    config = engine.config
    return {
        "version": __version__,
        "model": context.model_names[0],
        "started": context.created,
        "max_model_len": engine.model.max_model_len,
        "num_workers": config.placement.num_workers,
        "schedule": config.scheduler.schedule,
        "device": config.device.partition(",")[0],
    }

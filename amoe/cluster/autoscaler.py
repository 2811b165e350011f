"""Changes the number of expert workers as their queues ask for it: `amoe.policy.autoscaling` says when."""

from __future__ import annotations

import asyncio
import logging

from amoe.clock import Clock, MonotonicClock
from amoe.cluster.admin import ClusterAdmin
from amoe.config import AutoscaleConfig
from amoe.errors import AmoeError
from amoe.policy.autoscaling import AutoscaleState, ExpertLoad, wanted_workers
from amoe.stats import WorkerStats

logger = logging.getLogger(__name__)

PERIOD_S = 0.5
SILENCE_S = 1.5  # three heartbeats: what a worker said before that is not what it does now
RETRY_S = 30.0  # after a change that could not be made: there may be room by then


def queue_age(before: WorkerStats, after: WorkerStats) -> float:
    """How long tokens waited for a worker's experts, between two of its heartbeats.

    Queues fill and drain many times meanwhile, so it is the mean over the tokens that ran, layers together; or the age
    of who waits still, where that is more: nothing may run at all.
    """
    waited = _waited(after) - _waited(before)
    tokens = _tokens(after) - _tokens(before)
    oldest = max((queue.age_s for queue in after.queues if queue.kind == "experts"), default=0.0)
    return max(waited / tokens if tokens > 0 else 0.0, oldest)


def expert_load(before: WorkerStats, after: WorkerStats) -> ExpertLoad | None:
    """What a worker did between two heartbeats; None: they are of different lives, or no time lies between."""
    seconds = after.at_s - before.at_s
    if seconds <= 0 or after.loops < before.loops:
        return None
    busy = (after.experts_s - before.experts_s) / seconds
    return ExpertLoad(queue_age(before, after), min(1.0, max(0.0, busy)))


class Autoscaler:
    """Hears the heartbeats, and asks for workers.

    Args:
        admin: who starts and stops them.
    """

    def __init__(self, config: AutoscaleConfig, admin: ClusterAdmin, clock: Clock | None = None) -> None:
        self._config = config
        self._admin = admin
        self._clock = clock or MonotonicClock()
        self._state = AutoscaleState()
        self._last: dict[int, WorkerStats] = {}
        self._loads: dict[int, tuple[float, ExpertLoad]] = {}  # when it was said, by rank

    def observe(self, stats: WorkerStats) -> None:
        """A worker's heartbeat."""
        if stats.role != "experts":
            return
        last = self._last.get(stats.rank)
        self._last[stats.rank] = stats
        if last is not None and (load := expert_load(last, stats)) is not None:
            self._loads[stats.rank] = (self._clock.now(), load)

    async def run(self) -> None:
        """Look at the queues twice a second, until cancelled."""
        while True:
            await asyncio.sleep(PERIOD_S)
            await self.step()

    async def step(self) -> None:
        """Look once; where the number is wrong, change it, and wait until that is done."""
        status, now = self._admin.status(), self._clock.now()
        serving = {worker.rank for worker in status.workers if worker.role == "experts" and worker.state == "serving"}
        loads = {rank: load for rank, (at, load) in self._loads.items() if rank in serving and now - at < SILENCE_S}
        count = status.num_expert_workers
        wanted, self._state = wanted_workers(self._config, self._state, loads, count, now)
        if wanted == count:
            return
        logger.info("autoscaling: %d -> %d expert workers (%s)", count, wanted, _reason(loads))
        try:
            await self._admin.scale_experts(wanted)
        except AmoeError as error:
            logger.warning("autoscaling: there cannot be %d expert workers now: %s", wanted, error)
            self._state = AutoscaleState(settled_at=self._clock.now() + RETRY_S)
        else:
            self._state = AutoscaleState(settled_at=self._clock.now() + self._state.settled_at - now)


def _reason(loads: dict[int, ExpertLoad]) -> str:
    age = max((load.queue_age_s for load in loads.values()), default=0.0)
    busy = sum(load.busy for load in loads.values())
    return f"tokens wait {age:.3f} s, the workers' time is used {busy:.2f} times"


def _waited(stats: WorkerStats) -> float:
    return sum(queue.waited_s for queue in stats.queues if queue.kind == "experts")


def _tokens(stats: WorkerStats) -> float:
    """Sum of the histogram's values: tokens that went through the expert blocks of all layers."""
    return sum(sizes.total for sizes in stats.batch_sizes if sizes.kind == "experts")

"""Changes the number of expert workers as their queues ask for it: `amoe.policy.autoscaling` says when."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from amoe.clock import Clock, MonotonicClock
from amoe.cluster.admin import ClusterAdmin
from amoe.config import AutoscaleConfig
from amoe.errors import AmoeError
from amoe.policy.autoscaling import AutoscaleState, ExpertLoad, Flow, Trial, queue_age, wanted_workers
from amoe.stats import WorkerStats

logger = logging.getLogger(__name__)

PERIOD_S = 0.5
WINDOW_S = 1.0  # a worker is judged by so much of its time, however often it tells of itself: some steps may be long
SILENCE_S = 2.5  # what a worker said before that is not what it does now
RETRY_S = 30.0  # after a change that could not be made: there may be room by then


def expert_load(before: WorkerStats, after: WorkerStats) -> ExpertLoad:
    """What an expert worker did between two heartbeats of one life."""
    tokens = _tokens(after, "experts") - _tokens(before, "experts")
    waited = after.expert_wait_s - before.expert_wait_s
    busy = (after.experts_s - before.experts_s) / (after.at_s - before.at_s)
    return ExpertLoad(max(0.0, waited / tokens) if tokens > 0 else 0.0, min(1.0, max(0.0, busy)))


@dataclass(frozen=True, slots=True)
class Passage:
    """What the tokens of one home did in a window of its time.

    Attributes:
        home_s: seconds that tokens spent in its queues and blocks, summed over `tokens`, which passed a layer each.
        away_s: seconds from dispatch to last answer, summed over `joins`: tokens, or parts of prompts.
        sequences: that were running.
    """

    home_s: float
    tokens: float
    away_s: float
    joins: float
    sequences: float


def passage(before: WorkerStats, after: WorkerStats) -> Passage:
    """What an attention worker's tokens did between two heartbeats of one life."""
    return Passage(
        max(0.0, _home_seconds(after) - _home_seconds(before)),
        max(0.0, _tokens(after, "attention") - _tokens(before, "attention")),
        max(0.0, sum(item.total for item in after.join_waits) - sum(item.total for item in before.join_waits)),
        max(0, _num_joins(after) - _num_joins(before)),
        (before.num_running + after.num_running) / 2,
    )


def flow_of(passages: Sequence[Passage]) -> Flow:
    """Of all homes together."""
    tokens, joins = sum(item.tokens for item in passages), sum(item.joins for item in passages)
    return Flow(
        sum(item.home_s for item in passages) / tokens if tokens else 0.0,
        sum(item.away_s for item in passages) / joins if joins else 0.0,
        sum(item.sequences for item in passages),
    )


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
        self._bases: dict[int, WorkerStats] = {}  # where the window of each worker began
        self._loads: dict[int, tuple[float, ExpertLoad]] = {}  # when it was said, by rank
        self._passages: dict[int, tuple[float, Passage]] = {}

    def observe(self, stats: WorkerStats) -> None:
        """A worker's heartbeat."""
        base = self._bases.setdefault(stats.rank, stats)
        if stats.loops < base.loops:  # of another life
            self._bases[stats.rank] = stats
        elif stats.at_s - base.at_s >= WINDOW_S:
            self._bases[stats.rank] = stats
            if stats.role == "experts":
                self._loads[stats.rank] = self._clock.now(), expert_load(base, stats)
            else:
                self._passages[stats.rank] = self._clock.now(), passage(base, stats)

    async def run(self) -> None:
        """Look at the queues twice a second, until cancelled."""
        while True:
            await asyncio.sleep(PERIOD_S)
            await self.step()

    async def step(self) -> None:
        """Look once; where the number is wrong, change it, and wait until that is done."""
        status, now = self._admin.status(), self._clock.now()
        if status.action:  # it may change the number, or what is measured
            self._state = self._state.unmoved()
            return
        serving = {worker.rank for worker in status.workers if worker.role == "experts" and worker.state == "serving"}
        loads = {rank: load for rank, (at, load) in self._loads.items() if rank in serving and now - at < SILENCE_S}
        flow = flow_of([passed for at, passed in self._passages.values() if now - at < SILENCE_S])
        count = status.num_expert_workers
        before = self._state.futile
        wanted, self._state = wanted_workers(self._config, self._state, loads, flow, count, now)
        futile = None if self._state.futile is before else self._state.futile
        if wanted == count:
            return
        logger.info(
            "autoscaling: %d -> %d expert workers (%s)",
            count,
            wanted,
            _reason(self._config, count, loads, flow) if futile is None else _complaint(futile),
        )
        try:
            await self._admin.scale_experts(wanted)
        except AmoeError as error:
            logger.warning("autoscaling: there cannot be %d expert workers now: %s", wanted, error)
            self._state = self._state.settling(self._clock.now() + RETRY_S)
        except Exception:  # it must go on to look: a later attempt may do
            logger.exception("autoscaling: there cannot be %d expert workers now", wanted)
            self._state = self._state.settling(self._clock.now() + RETRY_S)
        else:
            self._state = self._state.settling(self._clock.now() + self._state.settled_at - now)


def _reason(config: AutoscaleConfig, count: int, loads: Mapping[int, ExpertLoad], flow: Flow) -> str:
    if not config.min_workers <= count <= config.max_workers:
        return f"there shall be {config.min_workers} to {config.max_workers}"
    age, busy = queue_age(loads, flow), max((load.busy for load in loads.values()), default=0.0)
    return (
        f"of {flow.pace_s(age) * 1e3:.1f} ms that a layer takes, tokens wait {age * 1e3:.1f} ms for "
        f"others at the experts; the busiest worker uses {busy:.0%} of its time"
    )


def _complaint(futile: Trial) -> str:
    return (
        f"one more has not helped: tokens waited {futile.age_s * 1e3:.1f} ms for others at the experts before, and "
        f"{futile.age_after_s * 1e3:.1f} ms since; there will be none again for this load. Replicas of hot experts may "
        "help: --redundant-experts, amoe scale --replicas"
    )


def _home_seconds(stats: WorkerStats) -> float:
    """That tokens have spent in the queues and blocks of a home."""
    return sum(queue.waited_s + queue.ran_s for queue in stats.queues if queue.kind != "experts")


def _num_joins(stats: WorkerStats) -> int:
    return sum(sum(waits.counts) for waits in stats.join_waits)


def _tokens(stats: WorkerStats, kind: str) -> float:
    """Sum of the histogram's values: tokens that went through such blocks, of all layers."""
    return sum(sizes.total for sizes in stats.batch_sizes if sizes.kind == kind)

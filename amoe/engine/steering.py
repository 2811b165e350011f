"""Steers running workers by what their heartbeats say: measures, plans every now and then, tells.

`amoe.policy.steering` says what to do about the numbers; here is where they come from and where the plans go.
"""

from __future__ import annotations

import asyncio
import logging
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from amoe.clock import Clock
from amoe.config import EngineConfig
from amoe.engine.messages import Steer
from amoe.policy.replicas import primary_shares
from amoe.policy.steering import (
    COUPLING,
    Measured,
    ReplicaPlan,
    moved_part,
    owner_speeds,
    plan_homes,
    plan_replicas,
)
from amoe.stats import HistogramSnapshot, SteeringStats, WorkerStats
from amoe.types import Int16Array

logger = logging.getLogger(__name__)

Float64Array = npt.NDArray[np.float64]

MEMORY_S = 10.0  # what was measured so long ago counts 1/e
HOPE_S = 30.0  # after so long a better plan is looked for, though the last one keeps its promise
# Planning computes in small steps, each of which would keep the interpreter from the event loop for 5 ms.
PLANNING_SWITCH_S = 5e-4


@dataclass(slots=True)
class _Counts:
    """Counters of one worker: cumulative ones, or what of them counts still. Pairs are [L, E], or [1, 1] if none."""

    pairs: Float64Array = field(default_factory=lambda: np.zeros((1, 1)))
    work: float = 0.0
    experts_s: float = 0.0
    home_s: float = 0.0
    tokens: float = 0.0
    steps: float = 0.0

    @classmethod
    def of(cls, stats: WorkerStats) -> _Counts:
        """Tokens are summed over the layers' attention blocks, steps as well."""
        attention: list[HistogramSnapshot] = [item for item in stats.batch_sizes if item.kind == "attention"]
        return cls(
            np.asarray(stats.expert_pairs or [[0]], np.float64),
            float(stats.expert_work),
            stats.experts_s,
            stats.home_s,
            sum(item.total for item in attention),
            float(sum(sum(item.counts) for item in attention)),
        )

    def plus(self, other: _Counts, factor: float = 1.0) -> _Counts:
        """Sum with `factor` times another."""
        return _Counts(
            self.pairs + factor * other.pairs,
            self.work + factor * other.work,
            self.experts_s + factor * other.experts_s,
            self.home_s + factor * other.home_s,
            self.tokens + factor * other.tokens,
            self.steps + factor * other.steps,
        )


@dataclass(slots=True)
class _Meter:
    """What one worker has done lately: an exponentially weighted sum over time."""

    total: _Counts = field(default_factory=_Counts)
    recent: _Counts = field(default_factory=_Counts)
    seen_at: float = -math.inf

    def observe(self, total: _Counts, now: float) -> None:
        """Take cumulative counters. Idle time makes nobody forget."""
        news = total.plus(self.total, -1.0)
        if news.steps < 0 or news.work < 0:
            news = total  # another process has taken its place
        if news.home_s + news.experts_s > 0:
            decay = math.exp(-(now - self.seen_at) / MEMORY_S)
            self.recent = news.plus(self.recent, decay)
        self.total, self.seen_at = total, now


class Steering:
    """Plans for one cluster of workers.

    Args:
        owners: [num_layers, num_experts, R] where experts live; None: not known, their shares stay as they are.
        send: takes a message to the worker of a rank.
        tell: takes what is in force after each plan.

    Attributes:
        state: what is in force.
    """

    def __init__(
        self,
        config: EngineConfig,
        owners: Int16Array | None,
        clock: Clock,
        *,
        send: Callable[[int, Steer], None],
        tell: Callable[[SteeringStats], None] = lambda state: None,
    ) -> None:
        placement, scheduler = config.placement, config.scheduler
        self._homes, self._owner_ranks = placement.attention_ranks, placement.expert_ranks
        self._owners = owners if owners is not None and owners.shape[-1] > 1 else None
        self._is_lockstep = scheduler.schedule == "lockstep"
        self._ridge_tokens = config.ridge_tokens
        self._interval_s = config.steering.interval_s
        self._send = send
        self._tell = tell
        self._clock = clock
        self._meters = {rank: _Meter() for rank in range(placement.num_workers)}
        self._num_waves = 0
        self._home_shares = np.full(len(self._homes), 1 / len(self._homes))
        self._plan = ReplicaPlan(primary_shares(owners)) if self._owners is not None and owners is not None else None
        self._hopes_until = -math.inf
        self.state = SteeringStats(
            dict.fromkeys(self._owner_ranks, 1.0), dict(zip(self._homes, self._home_shares.tolist(), strict=True))
        )

    def observe(self, stats: WorkerStats) -> None:
        """A heartbeat has come."""
        self._meters[stats.rank].observe(_Counts.of(stats), self._clock.now())
        if stats.role != "experts":
            self._num_waves = stats.num_waves

    async def run(self) -> None:
        """Steer every now and then, until cancelled; not at all where there is nothing to choose from."""
        while self._interval_s > 0 and (len(self._homes) > 1 or self._plan is not None):
            await asyncio.sleep(self._interval_s)
            try:
                await self.steer()
            except Exception:
                logger.exception("no plan this time: everything stays as it is")

    async def steer(self) -> None:
        """Plan once, and tell the homes what has changed."""
        measured = self._measured()
        if measured is None:
            return
        self._home_shares = plan_homes(measured, self._home_shares, is_sequential=self._is_sequential)
        speed = owner_speeds(measured.work, measured.expert_s)
        self.state.home_share = dict(zip(self._homes, self._home_shares.tolist(), strict=True))
        self.state.owner_speed = dict(zip(self._owner_ranks, speed.tolist(), strict=True))
        if self._plan is not None and measured.knows_experts:
            await self._steer_replicas(self._plan, measured.batch_load(), speed)
        self._tell(self.state)

    async def _steer_replicas(self, current: ReplicaPlan, load: Float64Array, speed: Float64Array) -> None:
        assert self._owners is not None
        if self._clock.now() >= self._hopes_until:
            current = replace(current, imbalance=1.0)
            self._hopes_until = self._clock.now() + HOPE_S
        coupling = 0.0 if self._is_sequential else COUPLING
        plan = await asyncio.to_thread(_plan, load, self._owners, self._ridge_tokens, speed, current, coupling)
        if plan.shares is not current.shares:
            message = Steer(plan.shares.astype("<f4").tobytes())
            for rank in self._homes:
                self._send(rank, message)
            self.state.num_plans += 1
        self._plan = plan
        self.state.moved = moved_part(load, plan.shares)

    @property
    def _is_sequential(self) -> bool:
        """Attention and experts never run at the same time, so that every layer has to be level by itself."""
        return self._is_lockstep or self._num_waves == 1

    def _measured(self) -> Measured | None:
        """None: nothing has been computed yet."""
        owners = [self._meters[rank].recent for rank in self._owner_ranks]
        homes = [self._meters[rank].recent for rank in self._homes]
        pairs = sum((counts.pairs for counts in owners), np.zeros((1, 1)))
        if not pairs.any() or not any(counts.tokens for counts in homes):
            return None
        num_layers = len(pairs)
        is_owner = [float(rank in self._owner_ranks) for rank in self._homes]
        return Measured(
            pairs=pairs,
            work=np.array([counts.work for counts in owners]),
            expert_s=np.array([counts.experts_s for counts in owners]),
            tokens=np.array([counts.tokens for counts in homes]) / num_layers,
            home_s=np.array([counts.home_s for counts in homes]),
            elsewhere_s=np.array([counts.experts_s for counts in homes]) * is_owner,
            tokens_per_batch=sum(counts.tokens / counts.steps for counts in homes if counts.steps),
        )


def _plan(
    load: Float64Array,
    owners: Int16Array,
    ridge_tokens: int,
    speed: Float64Array,
    current: ReplicaPlan,
    coupling: float,
) -> ReplicaPlan:
    """`plan_replicas` in a thread beside the event loop."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(PLANNING_SWITCH_S)
    try:
        return plan_replicas(load, owners, ridge_tokens, speed, current, coupling)
    finally:
        sys.setswitchinterval(usual)

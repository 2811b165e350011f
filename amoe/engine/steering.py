"""Steers running workers by what their heartbeats say: measures, plans every now and then, tells.

`amoe.policy.steering` says what to do about the numbers; here is where they come from and where the plans go.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from amoe.clock import Clock
from amoe.config import EngineConfig
from amoe.engine.load_meters import LoadMeters
from amoe.engine.messages import Steer, Topology
from amoe.engine.planning import considerate
from amoe.policy.replicas import present_first, primary_shares
from amoe.policy.steering import (
    COUPLING,
    ReplicaPlan,
    lasting_speeds,
    moved_part,
    owner_speeds,
    plan_homes,
    plan_replicas,
)
from amoe.stats import SteeringStats, WorkerStats
from amoe.types import BoolArray, Int16Array

logger = logging.getLogger(__name__)

Float64Array = npt.NDArray[np.float64]

HOPE_S = 30.0  # after so long a better plan is looked for, though the last one keeps its promise


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
        self._homes, self._owner_ranks = placement.attention_ranks, placement.owner_ranks
        self._is_lockstep = scheduler.schedule == "lockstep"
        self._ridge_tokens = config.ridge_tokens
        self._interval_s = config.steering.interval_s
        self._send = send
        self._tell = tell
        self._clock = clock
        self._meters = LoadMeters(self._homes, self._owner_ranks)
        self._num_waves = 0
        self._home_shares = np.full(len(self._homes), 1 / len(self._homes))
        self._hopes_until = -math.inf
        self._version = 0
        self._lives = dict.fromkeys(range(placement.num_workers), 0)  # incarnation by rank, of those that are there
        self._changed = asyncio.Event()
        self._replicas: _Replicas | None = None
        if owners is not None:
            self._replicas = _Replicas(owners, self._present_owners())
        self.state = SteeringStats(
            dict.fromkeys(placement.expert_ranks, 1.0), dict(zip(self._homes, self._home_shares.tolist(), strict=True))
        )

    def observe(self, stats: WorkerStats) -> None:
        """A heartbeat has come. One of a worker that is gone, or not there yet, says nothing."""
        if stats.rank not in self._lives:
            return
        self._meters.observe(stats, self._clock.now())
        if stats.role != "experts":
            self._num_waves = stats.num_waves

    def measured_load(self) -> Float64Array | None:
        """[num_layers, num_experts] pairs that have been computed lately; None: nothing has been."""
        return self._meters.load()

    def measured_speeds(self) -> Float64Array:
        """[D] of the owners, relative to their median; 1 where they are about the same, or nothing is known."""
        measured = self._meters.measured()
        if measured is None:
            return np.ones(len(self._owner_ranks))
        return lasting_speeds(owner_speeds(measured.work, measured.expert_s))

    def set_topology(self, topology: Topology) -> None:
        """Other workers are there, or hold other experts: homes have begun anew, at the first replica of each expert
        that is there. The next plan follows at once, if there is anything to choose."""
        lives = {rank: life for rank, life in enumerate(topology.incarnations) if life >= 0}
        for rank, life in self._lives.items():
            if lives.get(rank) != life:
                self._meters.forget(rank)
        self._lives, self._version = lives, topology.version
        self.state.owner_speed = {
            rank: self.state.owner_speed.get(rank, 1.0) for rank in self._owner_ranks if rank in lives
        }
        if self._replicas is not None:
            owners = np.frombuffer(topology.owners, "<i2").astype(np.int16)
            shape = (*self._replicas.owners.shape[:2], topology.num_replicas)
            self._replicas = _Replicas(owners.reshape(shape), self._present_owners())
            self._changed.set()

    def _present_owners(self) -> BoolArray:
        return np.array([rank in self._lives for rank in self._owner_ranks])

    async def run(self) -> None:
        """Steer every now and then, and whenever the topology has changed, until cancelled; not at all where there will
        never be anything to choose from."""
        while self._interval_s > 0 and (len(self._homes) > 1 or self._replicas is not None):
            await self._pause()
            try:
                await self.steer()
            except Exception:
                logger.exception("no plan this time: everything stays as it is")

    async def _pause(self) -> None:
        """Until the next plan is due."""
        try:
            await asyncio.wait_for(self._changed.wait(), self._interval_s)
        except TimeoutError:
            return
        self._changed.clear()

    async def steer(self) -> None:
        """Plan once, and tell the homes what has changed."""
        measured = self._meters.measured()
        if measured is None:
            return
        self._home_shares = plan_homes(measured, self._home_shares, is_sequential=self._is_sequential)
        speed = owner_speeds(measured.work, measured.expert_s)
        self.state.home_share = dict(zip(self._homes, self._home_shares.tolist(), strict=True))
        speeds = zip(self._owner_ranks, speed.tolist(), strict=True)
        self.state.owner_speed = {rank: value for rank, value in speeds if rank in self._lives}
        if self._replicas is not None and self._replicas.has_choice and measured.knows_experts:
            await self._steer_replicas(self._replicas, measured.batch_load(), speed)
        self._tell(self.state)

    async def _steer_replicas(self, replicas: _Replicas, load: Float64Array, speed: Float64Array) -> None:
        current = replicas.plan
        if self._clock.now() >= self._hopes_until:
            current = replace(current, imbalance=1.0)
            self._hopes_until = self._clock.now() + HOPE_S
        coupling = 0.0 if self._is_sequential else COUPLING
        plan = await asyncio.to_thread(
            considerate, plan_replicas, load, replicas.here, self._ridge_tokens, speed, current, coupling
        )
        if replicas is not self._replicas:
            return  # another table has come meanwhile, and a plan for it is due
        if plan.shares is not current.shares:
            message = Steer(replicas.as_placed(plan.shares).astype("<f4").tobytes(), self._version)
            for rank in self._homes:
                if rank in self._lives:
                    self._send(rank, message)
            self.state.num_plans += 1
        replicas.plan = plan
        self.state.moved = moved_part(load, plan.shares)

    @property
    def _is_sequential(self) -> bool:
        """Attention and experts never run at the same time, so that every layer has to be level by itself."""
        return self._is_lockstep or self._num_waves == 1


class _Replicas:
    """One table of owners, and the shares in force.

    Attributes:
        owners: [L, E, R] as it was placed.
        here: [L, E, R] the same with those that are there first, and without the others.
        plan: for `here`.
    """

    def __init__(self, owners: Int16Array, present: BoolArray) -> None:
        self.owners = owners
        self._order, self.here = present_first(owners, present)
        self.plan = ReplicaPlan(primary_shares(self.here))

    @property
    def has_choice(self) -> bool:
        """Some expert has more than one replica that is there."""
        return bool(((self.here >= 0).sum(axis=-1) > 1).any())

    def as_placed(self, shares: Float64Array) -> Float64Array:
        """Shares [L, E, R] of `here`, in the order of `owners`."""
        placed = np.empty_like(shares)
        np.put_along_axis(placed, self._order, shares, axis=-1)
        return placed

"""From heartbeats to a change of the number of workers."""

from __future__ import annotations

import asyncio

import pytest

from amoe.clock import ManualClock
from amoe.cluster.admin import ClusterStatus, WorkerStatus
from amoe.cluster.autoscaler import RETRY_S, Autoscaler, expert_load, queue_age
from amoe.config import AutoscaleConfig
from amoe.errors import ConfigError
from amoe.policy.autoscaling import COOLDOWN_S, SUSTAIN_S, ExpertLoad
from amoe.stats import HistogramSnapshot, QueueSnapshot, WorkerStats

CONFIG = AutoscaleConfig(min_workers=1, max_workers=3, queue_age_s=0.2)


def heartbeat(
    at_s: float, *, rank: int = 1, waited_s: float = 0, tokens: int = 0, age_s: float = 0, busy_s: float = 0, **more
) -> WorkerStats:
    """Cumulative counters of an expert worker of two layers, each with half of what there is."""
    return WorkerStats(
        rank,
        more.pop("role", "experts"),
        at_s=at_s,
        loops=more.pop("loops", int(at_s * 100)),
        experts_s=busy_s,
        queues=[QueueSnapshot("experts", layer, 1, age_s, waited_s / 2) for layer in (0, 1)],
        batch_sizes=[HistogramSnapshot("experts", layer, [], tokens / 2) for layer in (0, 1)],
    )


class FakeAdmin:
    """One attention worker and `count` expert workers, all of which serve."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.asked: list[int] = []
        self.refuses = False

    def status(self) -> ClusterStatus:
        roles = ["attention"] + ["experts"] * self.count
        workers = [WorkerStatus(rank=rank, title="", role=role, state="serving") for rank, role in enumerate(roles)]
        return ClusterStatus(version=1, workers=workers, num_expert_workers=self.count, max_expert_workers=3)

    async def scale_experts(self, count: int) -> ClusterStatus:
        self.asked.append(count)
        if self.refuses:
            raise ConfigError("no room")
        self.count = count
        return self.status()


def test_queue_age_is_the_mean_wait_or_the_oldest_token():
    before = heartbeat(10.0, waited_s=5, tokens=100)
    assert queue_age(before, heartbeat(10.5, waited_s=8, tokens=110)) == pytest.approx(0.3)
    assert queue_age(before, heartbeat(10.5, waited_s=8, tokens=110, age_s=0.7)) == 0.7
    assert queue_age(before, heartbeat(10.5, waited_s=6, tokens=100, age_s=0.4)) == 0.4  # nothing ran


def test_load_between_two_heartbeats_of_one_life():
    before = heartbeat(10.0, busy_s=3.0)
    assert expert_load(before, heartbeat(12.0, busy_s=4.5)) == ExpertLoad(0.0, 0.75)
    assert expert_load(before, heartbeat(10.0, busy_s=3.0)) is None
    assert expert_load(before, heartbeat(11.0, loops=3)) is None  # it has been started anew


class Driven:
    """An autoscaler, and workers that have worked for `busy` of their time and kept tokens for `age_s`."""

    def __init__(self, count: int) -> None:
        self.clock = ManualClock(50.0)
        self.admin = FakeAdmin(count)
        self.scaler = Autoscaler(CONFIG, self.admin, self.clock)

    def go_on(self, seconds: float, *, age_s: float = 0.0, busy: float = 0.0) -> None:
        for _ in range(round(seconds / 0.5)):
            self.clock.advance(0.5)
            now = self.clock.now()
            for rank in range(1, 1 + self.admin.count):
                self.scaler.observe(heartbeat(now, rank=rank, age_s=age_s, busy_s=busy * now))
            self.scaler.observe(heartbeat(now, rank=0, age_s=9, role="attention"))
            asyncio.run(self.scaler.step())


def test_up_and_down():
    driven = Driven(1)
    driven.go_on(SUSTAIN_S + 2, age_s=0.4, busy=1.0)
    assert driven.admin.asked == [2]
    driven.go_on(COOLDOWN_S + SUSTAIN_S + 2, age_s=0.4, busy=1.0)
    driven.go_on(60, age_s=0.4, busy=1.0)
    assert driven.admin.asked == [2, 3]
    driven.go_on(300)
    assert driven.admin.asked == [2, 3, 2, 1]


def test_silence_decides_nothing():
    driven = Driven(1)
    driven.go_on(1, age_s=0.4)
    for _ in range(100):
        driven.clock.advance(0.5)
        asyncio.run(driven.scaler.step())
    assert driven.admin.asked == []


def test_what_cannot_be_done_is_tried_again_later():
    driven = Driven(1)
    driven.admin.refuses = True
    driven.go_on(SUSTAIN_S + 5, age_s=0.4, busy=1.0)
    assert driven.admin.asked == [2]
    driven.admin.refuses = False
    driven.go_on(RETRY_S + SUSTAIN_S, age_s=0.4, busy=1.0)
    assert driven.admin.asked == [2, 2] and driven.admin.count == 2

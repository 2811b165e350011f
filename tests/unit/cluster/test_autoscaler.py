"""From heartbeats to a change of the number of workers."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

import pytest

from amoe.clock import ManualClock
from amoe.cluster.admin import ClusterStatus, WorkerStatus
from amoe.cluster.autoscaler import RETRY_S, WINDOW_S, Autoscaler, Passage, expert_load, flow_of, passage
from amoe.config import AutoscaleConfig
from amoe.errors import ConfigError
from amoe.policy.autoscaling import COOLDOWN_S, SUSTAIN_S, ExpertLoad, Flow
from amoe.stats import HistogramSnapshot, QueueSnapshot, WorkerStats

CONFIG = AutoscaleConfig(min_workers=1, max_workers=3)
BEAT_S = 0.2


def experts(at_s: float, *, rank: int = 1, age_s: float = 0.0, tokens: float = 0.0, busy_s: float = 0.0) -> WorkerStats:
    """Cumulative counters of an expert worker of two layers, each with half of the tokens, which waited for `age_s`."""
    sizes = [HistogramSnapshot("experts", layer, [], tokens / 2) for layer in (0, 1)]
    return WorkerStats(
        rank,
        "experts",
        at_s=at_s,
        loops=int(at_s * 100),
        experts_s=busy_s,
        batch_sizes=sizes,
        expert_wait_s=age_s * tokens,
    )


def home(
    at_s: float, *, tokens: float = 0.0, here_s: float = 0.0, away_s: float = 0.0, running: int = 64
) -> WorkerStats:
    """Of an attention worker: in each of two layers its tokens were `here_s` seconds at home, half of them queued, and
    `away_s` at experts."""
    each = tokens / 2
    queues = [QueueSnapshot("attention", layer, 0, 0.0, here_s * each / 2, here_s * each / 2) for layer in (0, 1)]
    sizes = [HistogramSnapshot("attention", layer, [], each) for layer in (0, 1)]
    waits = [HistogramSnapshot("experts", layer, [int(each)], away_s * int(each)) for layer in (0, 1)]
    loops = int(at_s * 100)
    home = WorkerStats(0, "attention", at_s=at_s, loops=loops, queues=queues, batch_sizes=sizes, join_waits=waits)
    home.num_running = running
    return home


class FakeAdmin:
    """One attention worker and `count` expert workers, all of which serve."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.asked: list[int] = []
        self.refuses: Exception | None = None
        self.action = ""

    def status(self) -> ClusterStatus:
        roles = ["attention"] + ["experts"] * self.count
        workers = [WorkerStatus(rank=rank, title="", role=role, state="serving") for rank, role in enumerate(roles)]
        return ClusterStatus(
            version=1, workers=workers, num_expert_workers=self.count, max_expert_workers=3, action=self.action
        )

    async def scale_experts(self, count: int) -> ClusterStatus:
        self.asked.append(count)
        if self.refuses is not None:
            raise self.refuses
        self.count = count
        return self.status()


def test_the_queue_age_is_the_mean_wait_of_a_window():
    before = experts(10.0, age_s=0.3, tokens=100, busy_s=3.0)
    after = experts(12.0, age_s=0.3, tokens=300, busy_s=4.5)
    after.expert_wait_s += 20.0
    assert expert_load(before, after) == ExpertLoad(pytest.approx(0.4), 0.75)
    assert expert_load(before, experts(12.0, age_s=0.3, tokens=100, busy_s=3.0)) == ExpertLoad(0.0, 0.0)


def test_the_pace_counts_all_of_a_tokens_time():
    before = home(10.0, tokens=100, here_s=0.1, away_s=0.2, running=2)
    after = home(11.0, tokens=300, here_s=0.1, away_s=0.2, running=5)
    assert passage(before, after) == Passage(pytest.approx(20.0), 200, pytest.approx(40.0), 200, 3.5)
    assert flow_of([Passage(60.0, 200, 9.0, 20, 3.5), Passage(20.0, 200, 3.0, 20, 1.0)]) == Flow(0.2, 0.3, 4.5)
    assert flow_of([]) == flow_of([Passage(0.0, 0.0, 0.0, 0, 0.0)]) == Flow()


class Driven:
    """An autoscaler, and workers that have worked for `busy` of their time and kept tokens waiting for `age_s`, of a
    second that each layer took them."""

    def __init__(self, count: int, config: AutoscaleConfig = CONFIG) -> None:
        self.clock = ManualClock(50.0)
        self.admin = FakeAdmin(count)
        self.scaler = Autoscaler(config, self.admin, self.clock)

    def go_on(
        self, seconds: float, *, age_s: float = 0.0, busy: float = 0.0, away_s: float = 0.9, running: int = 64
    ) -> None:
        for _ in range(round(seconds / BEAT_S)):
            self.clock.advance(BEAT_S)
            now = self.clock.now()
            for rank in range(1, 1 + self.admin.count):
                self.scaler.observe(experts(now, rank=rank, age_s=age_s, tokens=100 * now, busy_s=busy * now))
            self.scaler.observe(home(now, tokens=100 * now, here_s=0.1, away_s=away_s, running=running))
            asyncio.run(self.scaler.step())


def test_up_and_down():
    driven = Driven(1)
    driven.go_on(SUSTAIN_S + 2, age_s=0.85, busy=1.0)
    assert driven.admin.asked == [2]
    driven.go_on(COOLDOWN_S + SUSTAIN_S + 2, age_s=0.65, busy=1.0)
    driven.go_on(60, age_s=0.55, busy=1.0)
    assert driven.admin.asked == [2, 3]
    driven.go_on(300)
    assert driven.admin.asked == [2, 3, 2, 1]


def test_who_has_not_helped_goes_and_the_log_says_why(caplog: pytest.LogCaptureFixture):
    driven = Driven(1)
    with caplog.at_level(logging.INFO, "amoe"):
        driven.go_on(COOLDOWN_S + 2 * SUSTAIN_S + 60, age_s=0.65, busy=1.0)
    assert driven.admin.asked == [2, 1]
    assert "2 -> 1 expert workers (one more has not helped: tokens waited 639.8 ms" in caplog.messages[-1]


def test_a_wait_that_is_a_small_part_of_a_tokens_time_asks_for_nobody():
    driven = Driven(1)
    driven.go_on(60, age_s=0.65, busy=1.0, away_s=1.4)
    assert driven.admin.asked == []


def test_a_lone_user_asks_for_nobody_whatever_the_prompt():
    driven = Driven(1)
    driven.go_on(60, age_s=0.9, busy=1.0, running=1)
    assert driven.admin.asked == []
    driven = Driven(3)
    driven.go_on(300, age_s=0.9, busy=0.9, running=1)
    assert driven.admin.asked == [2, 1]


def test_what_is_out_of_bounds_and_cannot_be_brought_back_is_not_asked_for_all_the_time():
    driven = Driven(5)
    driven.admin.refuses = True
    driven.go_on(RETRY_S + 5)
    assert driven.admin.asked == [3, 3]


def test_a_number_of_seconds_is_a_bound_of_its_own():
    driven = Driven(1, replace(CONFIG, queue_age_s=0.5))
    driven.go_on(SUSTAIN_S + 2, age_s=0.65, busy=1.0, away_s=1.4)
    assert driven.admin.asked == [2]


def test_silence_decides_nothing():
    driven = Driven(1)
    driven.go_on(WINDOW_S + BEAT_S, age_s=0.65)
    for _ in range(100):
        driven.clock.advance(0.5)
        asyncio.run(driven.scaler.step())
    assert driven.admin.asked == []


def test_a_worker_that_has_been_started_anew_is_judged_by_its_new_life():
    """Its counters begin again at 0."""
    driven = Driven(1)
    driven.go_on(WINDOW_S, age_s=0.1, busy=0.1)
    for beat in range(60):
        driven.clock.advance(BEAT_S)
        driven.scaler.observe(experts(beat * BEAT_S, age_s=0.65, tokens=beat, busy_s=beat * BEAT_S))
        driven.scaler.observe(home(driven.clock.now(), tokens=100 * driven.clock.now(), here_s=0.1, away_s=0.9))
        asyncio.run(driven.scaler.step())
    assert driven.admin.asked == [2]


@pytest.mark.parametrize("reason", [ConfigError("no room"), RuntimeError("an error of ours, or of Ray")])
def test_what_cannot_be_done_is_tried_again_later(reason: Exception):
    driven = Driven(1)
    driven.admin.refuses = reason
    driven.go_on(SUSTAIN_S + 5, age_s=0.65, busy=1.0)
    assert driven.admin.asked == [2]
    driven.admin.refuses = None
    driven.go_on(RETRY_S + SUSTAIN_S, age_s=0.65, busy=1.0)
    assert driven.admin.asked == [2, 2] and driven.admin.count == 2


def test_nothing_is_asked_for_while_something_is_under_way():
    """It may be an operator's order, which would be undone when it is done."""
    driven = Driven(1)
    driven.admin.action = "moving 3 of 8 experts"
    driven.go_on(2 * SUSTAIN_S, age_s=0.65, busy=1.0)
    assert driven.admin.asked == []
    driven.admin.action = ""
    driven.go_on(SUSTAIN_S, age_s=0.65, busy=1.0)
    assert driven.admin.asked == [], "what was seen meanwhile does not count"
    driven.go_on(2, age_s=0.65, busy=1.0)
    assert driven.admin.asked == [2], "and nothing is remembered as decided"

"""Scaling by queue age: within bounds, one at a time, never to and fro."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from amoe.config import AutoscaleConfig
from amoe.policy.autoscaling import COOLDOWN_S, IDLE_S, SUSTAIN_S, AutoscaleState, ExpertLoad, wanted_workers

CONFIG = AutoscaleConfig(min_workers=1, max_workers=4, queue_age_s=0.2)
LATE = ExpertLoad(0.5, 1.0)
FINE = ExpertLoad(0.1, 0.7)
IDLE = ExpertLoad(0.0, 0.01)

LOADS = st.builds(ExpertLoad, st.floats(0, 2), st.floats(0, 1))


class Run:
    """Steps of half a second, as heartbeats come."""

    def __init__(self, count: int, config: AutoscaleConfig = CONFIG) -> None:
        self.config, self.count, self.now = config, count, 100.0
        self.state = AutoscaleState()
        self.changes: list[tuple[float, int]] = []

    def step(self, *loads: ExpertLoad, seconds: float = 0.5) -> int:
        self.now += seconds
        wanted, self.state = wanted_workers(self.config, self.state, dict(enumerate(loads)), self.count, self.now)
        if wanted != self.count:
            self.changes.append((self.now, wanted - self.count))
        self.count = wanted
        return wanted

    def go_on(self, load: ExpertLoad, seconds: float) -> int:
        for _ in range(round(seconds / 0.5)):
            self.step(*[load] * self.count)
        return self.count


def test_a_queue_that_stays_old_asks_for_one_more():
    run = Run(1)
    assert run.go_on(LATE, SUSTAIN_S) == 1
    assert run.step(LATE) == 2


def test_a_moment_does_not():
    run = Run(1)
    for _ in range(20):
        run.go_on(LATE, SUSTAIN_S - 0.5)
        run.step(FINE)
    assert run.changes == []


def test_the_worst_worker_counts():
    run = Run(2)
    for _ in range(10):
        run.step(IDLE, LATE)
    assert run.count == 3


def test_load_that_stays_goes_up_to_the_bound_with_a_pause_between():
    run = Run(1)
    assert run.go_on(LATE, 120) == CONFIG.max_workers
    times = [at for at, _ in run.changes]
    assert all(b - a >= COOLDOWN_S for a, b in itertools.pairwise(times))


def test_idle_workers_go_one_by_one():
    run = Run(4)
    assert run.go_on(IDLE, IDLE_S + 1) == 3
    assert run.go_on(IDLE, 5 * IDLE_S) == CONFIG.min_workers


def test_none_goes_whose_work_the_others_could_not_do():
    run = Run(2)
    assert run.go_on(ExpertLoad(0.01, 0.3), 10 * IDLE_S) == 2  # 0.6 would be left to one
    assert run.go_on(ExpertLoad(0.01, 0.2), 10 * IDLE_S) == 1


def test_while_one_is_being_replaced_nothing_is_decided():
    run = Run(2)
    for _ in range(400):
        run.step(LATE)
    assert run.changes == []


def test_a_number_out_of_bounds_is_brought_back():
    assert Run(7).step(*[FINE] * 7) == 4
    assert Run(1, AutoscaleConfig(min_workers=2, max_workers=3)).step(FINE) == 2


@given(st.integers(1, 4), st.lists(st.tuples(st.lists(LOADS, min_size=4, max_size=4), st.floats(0.1, 20)), max_size=60))
def test_always_within_bounds_and_by_one_with_pauses(count, steps):
    run = Run(count)
    for loads, seconds in steps:
        before = run.count
        after = run.step(*loads[:before], seconds=seconds)
        assert CONFIG.min_workers <= after <= CONFIG.max_workers and abs(after - before) <= 1
    times = [at for at, _ in run.changes]
    assert all(b - a >= COOLDOWN_S for a, b in itertools.pairwise(times))


@given(st.floats(0, 4), st.integers(1, 4))
def test_a_load_that_does_not_change_is_not_answered_to_and_fro(demand, count):
    """`demand` workers' worth of work, shared evenly; who is asked for more than he can do has a queue."""
    run = Run(count)
    for _ in range(1200):
        busy = min(1.0, demand / run.count)
        run.step(*[ExpertLoad(1.0 if demand / run.count > 0.95 else 0.0, busy)] * run.count)
    directions = [change for _, change in run.changes]
    assert len(set(directions)) <= 1

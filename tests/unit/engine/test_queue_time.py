"""A queue that would take longer than anybody waits refuses, as soon as it can tell."""

from __future__ import annotations

import pytest

from amoe.config import EngineConfig, SchedulerConfig
from amoe.engine.load import OpenLoad
from amoe.policy.admission import MIN_FINISHED, expected_wait_s

SEATS = 4


def load_of(max_queue_s: float) -> OpenLoad:
    config = EngineConfig(
        model="m", max_waiting=1000, max_queue_s=max_queue_s, scheduler=SchedulerConfig(max_num_seqs=SEATS)
    )
    return OpenLoad(config)


def fill(load: OpenLoad, count: int, now: float) -> None:
    for _ in range(count):
        load.enter(0, 10, 0, now)


def end(load: OpenLoad, count: int, start: float, every_s: float) -> float:
    for _ in range(count):
        start += every_s
        load.leave(0, 10, start)
    return start


@pytest.mark.parametrize(("num_waiting", "num_finished", "seconds", "wait"), [(20, 10, 5.0, 10.0), (0, 10, 5.0, 0.0)])
def test_the_wait_is_the_queue_over_the_rate(num_waiting: int, num_finished: int, seconds: float, wait: float) -> None:
    assert expected_wait_s(num_waiting, num_finished, seconds) == wait


def test_nothing_is_told_of_too_few() -> None:
    assert expected_wait_s(1000, MIN_FINISHED - 1, 1.0) is None
    assert expected_wait_s(1000, MIN_FINISHED, 0.0) is None


def test_a_queue_that_takes_too_long_refuses() -> None:
    load = load_of(max_queue_s=10.0)
    fill(load, SEATS + 30, 0.0)
    assert load.refusal(1, 10, 0.0) is None, "nothing is known yet"
    now = end(load, 10, 0.0, every_s=1.0)  # one a second, and 21 would wait
    refusal = load.refusal(1, 10, now)
    assert refusal is not None
    assert refusal.reason == "queue_time"
    assert "21 s" in refusal.message
    assert refusal.retry_after_s == 11
    now = end(load, 12, now, every_s=1.0)
    assert load.refusal(1, 10, now) is None, "nine wait, nine seconds"


def test_idle_time_is_no_slowness() -> None:
    load = load_of(max_queue_s=10.0)
    fill(load, SEATS + 1, 0.0)
    end(load, SEATS + 1, 0.0, every_s=0.1)
    fill(load, SEATS + 20, 3600.0)
    assert load.refusal(1, 10, 3600.5) is None
    now = end(load, 10, 3600.5, every_s=0.1)
    assert load.refusal(1, 10, now) is None


def test_0_is_off() -> None:
    load = load_of(max_queue_s=0.0)
    fill(load, 500, 0.0)
    assert load.refusal(1, 10, end(load, 10, 0.0, every_s=10.0)) is None

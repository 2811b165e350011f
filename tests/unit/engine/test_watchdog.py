"""Stopped, hung inside a step, turning without progress, dead; and slow, which is none of these."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from amoe.clock import ManualClock
from amoe.core.steps import ForwardStep
from amoe.engine.pulse import PulseThread, Turn
from amoe.engine.step_times import StepTimes
from amoe.engine.watchdog import Watchdog
from amoe.policy.patience import FIRST_STEP_S
from amoe.stats import QueueSnapshot, WorkerStats

PERIOD_S = 0.5


def beat(watchdog: Watchdog, rank: int = 0, **stats: Any) -> None:
    watchdog.beat(rank, WorkerStats(rank=rank, role="colocated", **stats))


def kinds(watchdog: Watchdog) -> tuple[int, str] | None:
    stall = watchdog.stalled
    return None if stall is None else (stall.rank, stall.kind)


def seconds_until_stalled(watchdog: Watchdog, each_period: Any, at_most: float = 200.0) -> float | None:
    """How long it takes from now on; None: longer than `at_most`."""
    seconds = 0.0
    while seconds < at_most:
        if watchdog.stalled is not None:
            return seconds
        seconds += PERIOD_S
        each_period(seconds)
        watchdog.advance(PERIOD_S)
    return None


def test_silence_is_noticed_within_ten_seconds_with_and_without_work():
    for work in ({}, {"num_running": 3}):
        watchdog = Watchdog(range(2))
        for rank in range(2):
            beat(watchdog, rank, **work)
        seconds = seconds_until_stalled(watchdog, lambda _, w=watchdog: beat(w, 0, steps=1))
        assert seconds is not None and 5.0 < seconds < 9.0
        assert kinds(watchdog) == (1, "silent")
        assert "worker 1 gives no sign of life" in str(watchdog.stalled)
        beat(watchdog, 1)
        assert watchdog.stalled is None


def test_nothing_is_expected_of_a_worker_that_is_gone():
    watchdog = Watchdog(range(2))
    beat(watchdog, 0)
    watchdog.advance(5.0)
    watchdog.forget(1)
    watchdog.forget(1)
    beat(watchdog, 0)
    watchdog.advance(5.0)
    assert watchdog.stalled is None
    watchdog.expect(1)
    watchdog.expect(7)  # one more than there were
    beat(watchdog, 0)
    beat(watchdog, 1)
    watchdog.advance(5.0)
    beat(watchdog, 0)
    beat(watchdog, 1)
    watchdog.advance(5.0)
    assert kinds(watchdog) == (7, "silent")


def test_who_waits_for_a_missing_worker_is_not_to_blame_and_has_its_full_time_when_it_is_back():
    watchdog = Watchdog(range(2))
    watchdog.forget(1)
    for _ in range(100):
        beat(watchdog, num_running=1, steps=7)
        watchdog.advance(PERIOD_S, is_somebody_missing=True)
    assert watchdog.stalled is None
    for _ in range(10):
        beat(watchdog, num_running=1, steps=7)
        watchdog.advance(PERIOD_S)
    watchdog.expect(1)
    beats = lambda _: [beat(watchdog, rank, num_running=1, steps=7) for rank in range(2)]  # noqa: E731
    seconds = seconds_until_stalled(watchdog, beats)
    assert seconds is not None and 6.0 < seconds < 9.0


def test_silence_is_death_at_last():
    watchdog = Watchdog(range(2), 80.0, 30.0)
    watchdog.advance(31.0)
    assert watchdog.silent is None
    beat(watchdog, 0)
    watchdog.advance(50.0)
    assert watchdog.silent == 1


def test_a_step_may_take_several_times_what_is_usual_and_no_longer():
    watchdog = Watchdog(range(1))
    beat(watchdog, num_running=1)
    seconds = seconds_until_stalled(watchdog, lambda now: watchdog.pulse(0, now, 2.0))
    assert seconds == pytest.approx(20.0, abs=1.0)
    assert kinds(watchdog) == (0, "in a step")
    beat(watchdog, num_running=1)
    assert watchdog.stalled is None


def test_a_short_step_that_hangs_is_noticed_within_ten_seconds():
    watchdog = Watchdog(range(1))
    beat(watchdog, num_running=1)
    seconds = seconds_until_stalled(watchdog, lambda now: watchdog.pulse(0, now, 0.002))
    assert seconds is not None and seconds < 9.0


def test_a_first_step_may_compile():
    watchdog = Watchdog(range(1))
    beat(watchdog, num_running=1)
    seconds = seconds_until_stalled(watchdog, lambda now: watchdog.pulse(0, now, None))
    assert seconds == pytest.approx(FIRST_STEP_S, abs=1.0)


def test_a_step_does_not_outlive_the_heartbeat_timeout():
    watchdog = Watchdog(range(1))
    for count in range(250):
        watchdog.pulse(0, count * PERIOD_S, 1e9)
        watchdog.advance(PERIOD_S)
    assert watchdog.silent == 0


def test_a_step_that_gets_on_outlives_the_heartbeat_timeout():
    watchdog = Watchdog(range(1))
    for count in range(500):
        watchdog.advance(PERIOD_S)
        watchdog.pulse(0, count * PERIOD_S % 4.0, None)
        assert watchdog.silent is None and watchdog.stalled is None
    watchdog.advance(watchdog.heartbeat_timeout_s)
    assert watchdog.silent == 0


def test_a_process_stopped_in_the_middle_of_a_step_is_silent():
    watchdog = Watchdog(range(1))
    beat(watchdog, num_running=1)
    watchdog.pulse(0, 3.0, 100.0)
    seconds = seconds_until_stalled(watchdog, lambda _: None)
    assert seconds is not None and seconds < 9.0
    assert kinds(watchdog) == (0, "silent")


@pytest.mark.parametrize("work", [{"num_running": 1}, {"num_waiting": 1}, {"queues": [QueueSnapshot("head", 0, 3, 1)]}])
def test_work_without_steps_is_a_stall_until_a_step(work):
    watchdog = Watchdog(range(1))
    seconds = seconds_until_stalled(watchdog, lambda _: beat(watchdog, steps=5, **work))
    assert seconds is not None and 6.0 < seconds < 9.0
    assert kinds(watchdog) == (0, "without a step")
    beat(watchdog, steps=6, **work)
    assert watchdog.stalled is None


def test_idle_and_slow_workers_do_not_stall():
    watchdog = Watchdog(range(2))
    queues = [QueueSnapshot("experts", 0, 0, 0.0)]

    def work(now: float) -> None:
        beat(watchdog, 0, queues=queues)
        beat(watchdog, 1, num_running=9, steps=int(now / 5))

    assert seconds_until_stalled(watchdog, work) is None


def test_who_waits_for_a_long_step_is_not_to_blame():
    watchdog = Watchdog(range(2))

    def work(now: float) -> None:
        beat(watchdog, 0, num_running=1, steps=7)
        watchdog.pulse(1, now, 5.0)

    seconds = seconds_until_stalled(watchdog, work)
    assert seconds is not None and seconds > 45.0
    assert kinds(watchdog) == (1, "in a step")


def forward_step(num_tokens: int) -> ForwardStep:
    slots = np.zeros(num_tokens, np.int32)
    return ForwardStep(slots, slots, slots, num_tokens)


class SlowStep:
    """A first step through 48 layers of 4 s each, as a watchdog sees it, from a fake clock."""

    def __init__(self, stops_in: int | None = None) -> None:
        self._clock, self._watchdog = ManualClock(), Watchdog(range(1))
        self._stops_in = stops_in
        self._control: Any = SimpleNamespace(
            send=lambda pulse: self._watchdog.pulse(0, pulse.step_s, pulse.usual_s),
        )
        turn = Turn(since=0.0, step=forward_step(2048))
        self._pulses = PulseThread(turn, StepTimes(48), self._control, self._clock, PERIOD_S, self._progress)

    def _progress(self) -> int:
        layer = int(self._clock.now() / 4.0)
        return layer if self._stops_in is None else min(layer, self._stops_in)

    def seconds_until_lost(self) -> float | None:
        while self._clock.now() < 48 * 4.0:
            self._clock.advance(PERIOD_S)
            self._watchdog.advance(PERIOD_S)
            self._pulses.look(self._control.send)
            if self._watchdog.stalled is not None or self._watchdog.silent is not None:
                return self._clock.now()
        return None


def test_a_step_through_all_layers_is_no_hang_as_long_as_it_gets_on():
    assert SlowStep().seconds_until_lost() is None
    seconds = SlowStep(stops_in=10).seconds_until_lost()
    assert seconds == pytest.approx(10 * 4.0 + FIRST_STEP_S, abs=1.0)

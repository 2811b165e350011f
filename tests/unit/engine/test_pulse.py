"""What the thread beside a worker's loop says, and when."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

from amoe.clock import ManualClock
from amoe.engine.messages import Pulse
from amoe.engine.pulse import PulseThread, Turn
from amoe.engine.step_times import COLD_STEPS, WELL_KNOWN_STEPS, StepTimes
from amoe.types import BlockId, BlockKind

PERIOD_S = 0.25


def step(num_tokens: int) -> Any:
    return SimpleNamespace(block=BlockId(BlockKind.EXPERTS, 0), num_tokens=num_tokens)


class Kept:
    """Something keeps the process for so much of any time."""

    share = 0.0

    def mark(self) -> None:
        pass

    def kept_s(self, seconds: float) -> float:
        return self.share * seconds


class Beside:
    """A thread that looks when it is told to."""

    def __init__(self) -> None:
        self.clock, self.turn, self.times, self.kept = ManualClock(10.0), Turn(signed_at=10.0), StepTimes(), Kept()
        self.progress = 0
        self.sent: list[Pulse] = []
        control: Any = SimpleNamespace(send=self.sent.append)
        self._thread = PulseThread(
            self.turn, self.times, control, self.clock, PERIOD_S, lambda: self.progress, hindrance=self.kept
        )

    def look(self, after_s: float = PERIOD_S) -> Pulse | None:
        """What it says then."""
        self.clock.advance(after_s)
        self.sent.clear()
        self._thread.look(self.sent.append)
        return self.sent[0] if self.sent else None


def test_only_a_turn_without_signs_of_the_loop_needs_one():
    beside = Beside()
    assert beside.look() is None, "it sleeps"
    beside.turn.since = beside.turn.signed_at = beside.clock.now()
    assert beside.look(0.2) is None
    assert beside.look(0.05) == Pulse(0.25, 0.0)
    beside.turn.signed_at = beside.clock.now()
    assert beside.look(0.2) is None
    assert beside.look(0.2) is not None


def test_what_is_known_of_the_step_is_told():
    beside = Beside()
    beside.turn.since, beside.turn.step = beside.clock.now(), step(8)
    assert beside.look() == Pulse(0.25, None)
    for _ in range(COLD_STEPS + WELL_KNOWN_STEPS):
        beside.times.observe(step(8), 0.125)
    assert beside.look() == Pulse(0.5, 0.125, 0.25, 0.125)
    beside.times.observe(step(8), 0.375)
    pulse = beside.look()
    assert pulse is not None and pulse.longest_s == 0.375


def test_time_in_which_something_kept_the_loop_is_not_free():
    beside = Beside()
    beside.turn.since, beside.turn.step = beside.clock.now(), step(8)
    told = [beside.look() for _ in range(3)]
    beside.kept.share = 0.5
    told += [beside.look() for _ in range(2)]
    assert [pulse.free_s for pulse in told if pulse] == [0.0, 0.25, 0.5, 0.625, 0.75]
    assert [pulse.step_s for pulse in told if pulse] == [0.25, 0.5, 0.75, 1.0, 1.25]


def test_time_in_which_this_thread_did_not_run_either_is_not_free():
    """A machine that was suspended."""
    beside = Beside()
    beside.turn.since, beside.turn.step = beside.clock.now(), step(8)
    beside.look()
    pulse = beside.look(3600.0)
    assert pulse is not None
    assert (pulse.step_s, pulse.free_s) == (3600.25, 2 * PERIOD_S)


def test_whoever_gets_on_begins_anew():
    beside = Beside()
    beside.turn.since, beside.turn.step = beside.clock.now(), step(8)
    for _ in range(3):
        beside.look()
    beside.progress += 1  # a layer of the step
    assert beside.look() == Pulse(0.0, None)
    assert beside.look() == Pulse(0.25, None, 0.25)
    beside.turn.step = None  # the rest of the turn
    assert beside.look() == Pulse(0.0, 0.0)
    beside.look()
    beside.turn.since = beside.clock.now() - 0.125  # the next turn
    assert beside.look() == Pulse(0.375, 0.0)


def test_the_thread_runs_beside_a_loop_that_hangs():
    turn, sent = Turn(since=-100.0), []
    came = threading.Event()
    control: Any = SimpleNamespace(send=lambda message: (sent.append(message), came.set()))
    with PulseThread(turn, StepTimes(), control, ManualClock(0.0), 0.01):
        assert came.wait(60)
    assert sent[0] == Pulse(100.0, 0.0)

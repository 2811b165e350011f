"""A fault at any time, any phases of all periods: the loss is told within the failure timeout. Nobody is killed who is
only late, slow, or kept from running.

The real bookkeeping of worker and server, in virtual time: a worker's loop, the thread beside it, a home that waits for
it, and a server that looks.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

from hypothesis import given, settings
from hypothesis import strategies as st

from amoe.clock import ManualClock
from amoe.engine.messages import Pulse
from amoe.engine.pulse import PulseThread, Turn
from amoe.engine.step_times import COLD_STEPS, WELL_KNOWN_STEPS, StepTimes
from amoe.policy.patience import Patience, StepTime
from amoe.policy.supervision import LifeSigns, Loss
from amoe.types import BlockId, BlockKind

HOME, OWNER = 0, 1
STEP: Any = SimpleNamespace(block=BlockId(BlockKind.EXPERTS, 0), num_tokens=8)
FaultKind = Literal["none", "stop", "hang", "cut"]
Process = Iterator[float]  # seconds until it goes on


@dataclass(frozen=True, kw_only=True)
class Case:
    """Times are shares of the timeout.

    Attributes:
        fault_at: when the owner is stopped or cut off; its first step that ends later hangs.
        turn: that the owner's steps take; pause: between them.
        look_phase, thread_phase, home_phase: when the server, the thread and the home begin.
        transit: that messages take.
        kept: the share of all time in which other processes keep the owner from running.
    """

    timeout_s: float
    kind: FaultKind
    fault_at: float = 1.0
    turn: float = 0.002
    pause: float = 0.001
    look_phase: float = 0.0
    thread_phase: float = 0.0
    home_phase: float = 0.0
    transit: float = 0.01
    kept: float = 0.0


class World:
    """An owner, a home and a server."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.clock = ManualClock()
        self.patience = Patience(case.timeout_s)
        self.signs = LifeSigns(case.timeout_s)
        self.found: list[tuple[float, Loss]] = []
        self.turn, self.times = Turn(), StepTimes()
        for _ in range(COLD_STEPS + WELL_KNOWN_STEPS):
            self.times.observe(STEP, 0.005 * case.timeout_s)
        hindrance: Any = SimpleNamespace(mark=lambda: None, kept_s=lambda seconds: case.kept * seconds)
        control: Any = SimpleNamespace(send=self.on_pulse)
        self.thread = PulseThread(self.turn, self.times, control, self.clock, self.patience.sign_s, hindrance=hindrance)
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = itertools.count()
        for rank in (HOME, OWNER):
            self.signs.expect(rank)
            self.signs.beat(rank, 0.0)

    @property
    def fault_at(self) -> float:
        return self.case.fault_at * self.case.timeout_s

    def run(self, until: float) -> tuple[float, Loss] | None:
        """The first loss, and seconds from the fault to it; None: there is none up to `until`, in timeouts."""
        for process in (self.loop(), self.beside(), self.server(), self.home()):
            self.start(process)
        while self._events and not self.found and self._events[0][0] <= until * self.case.timeout_s:
            at, _, what = heapq.heappop(self._events)
            self.clock.advance(max(0.0, at - self.clock.now()))
            what()
        return (self.found[0][0] - self.fault_at, self.found[0][1]) if self.found else None

    def at(self, time: float, what: Callable[[], object]) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), what))

    def start(self, process: Process) -> None:
        def go_on() -> None:
            seconds = next(process, None)
            if seconds is not None:
                self.at(self.clock.now() + seconds, go_on)

        go_on()

    def say(self, what: Callable[[], object]) -> None:
        """To the server."""
        self.at(self.clock.now() + self.case.transit * self.case.timeout_s, what)

    def has_fault(self, kind: FaultKind) -> bool:
        return self.case.kind == kind and self.clock.now() >= self.fault_at

    def on_pulse(self, pulse: Pulse) -> None:
        step = StepTime(pulse.step_s, pulse.usual_s, pulse.free_s, pulse.longest_s)
        self.say(lambda: self.signs.pulse(OWNER, step))

    def loop(self) -> Process:
        """As `Worker.turn` and `Worker._sleep`."""
        next_sign = 0.0
        while not self.has_fault("stop"):
            self.turn.since = now = self.clock.now()
            self.turn.step = STEP
            yield self.case.turn * self.case.timeout_s
            if self.has_fault("hang") or self.has_fault("stop"):
                return
            self.turn.step = None
            if now >= next_sign:
                next_sign = now + self.patience.sign_s
                self.turn.signed_at = self.clock.now()
                self.say(lambda: self.signs.beat(OWNER, 0.0))
            self.turn.since = None
            yield min(self.case.pause * self.case.timeout_s, max(0.0, next_sign - self.clock.now()))

    def beside(self) -> Process:
        yield self.case.thread_phase * self.patience.sign_s
        while not self.has_fault("stop"):
            self.thread.look(self.on_pulse)
            yield self.patience.sign_s

    def home(self) -> Process:
        """It asks all the time; what it asks after a cut is lost."""
        yield self.case.home_phase * self.patience.sign_s
        while True:
            self.say(lambda: self.signs.beat(HOME, 0.0))
            waited_s = self.clock.now() - self.fault_at
            if self.case.kind == "cut" and waited_s >= self.patience.named_s:
                self.say(lambda seconds=waited_s: self.signs.accuse(HOME, OWNER, seconds))
            yield self.patience.sign_s

    def server(self) -> Process:
        yield self.case.look_phase * self.patience.look_s
        while True:
            self.signs.advance(self.patience.look_s)
            self.found += [(self.clock.now(), loss) for loss in self.signs.losses({HOME}, {OWNER}, lambda _: False)]
            yield self.patience.look_s


phases = st.floats(0.0, 1.0)
cases = st.builds(
    Case,
    timeout_s=st.sampled_from([0.2, 1.0, 2.0, 10.0]),
    kind=st.sampled_from(["stop", "hang", "cut"]),
    fault_at=st.floats(0.5, 1.0),
    turn=st.floats(0.001, 0.02),
    pause=st.floats(0.0005, 0.2),
    look_phase=phases,
    thread_phase=phases,
    home_phase=phases,
    transit=st.floats(0.0, 0.02),
)


@settings(max_examples=150, deadline=None)
@given(cases)
def test_every_fault_is_told_within_the_timeout(case: Case):
    # A hang comes with the first step that ends behind it, which begins when the loop has work.
    begins = (case.turn + case.pause) * case.timeout_s if case.kind == "hang" else 0.0
    found = World(case).run(until=4.0)
    assert found is not None
    seconds, loss = found
    assert seconds <= case.timeout_s + begins
    assert (loss.rank, loss.kind) == (OWNER, {"stop": "silent", "hang": "hung", "cut": "cut"}[case.kind])


@settings(max_examples=50, deadline=None)
@given(
    st.builds(
        Case,
        timeout_s=st.sampled_from([0.2, 2.0]),
        kind=st.just("none"),
        turn=st.floats(0.001, 0.55),
        pause=st.floats(0.001, 0.3),
        look_phase=phases,
        thread_phase=phases,
        home_phase=phases,
        transit=st.floats(0.0, 0.3),
    )
)
def test_nobody_is_lost_whose_steps_are_a_hundred_times_as_long_as_they_were(case: Case):
    """For more than half of the timeout, with messages that take a third of it."""
    assert World(case).run(until=8.0) is None


@settings(max_examples=50, deadline=None)
@given(phases, phases, st.floats(0.85, 1.0))
def test_nobody_is_lost_who_is_kept_from_running(look_phase: float, thread_phase: float, kept: float):
    """A step that never ends, in a process that others keep from running, is given the stall timeout."""
    case = Case(timeout_s=2.0, kind="hang", fault_at=0.5, look_phase=look_phase, thread_phase=thread_phase, kept=kept)
    assert World(case).run(until=3.9) is None
    found = World(case).run(until=5.0)
    assert found is not None and found[1].kind == "hung"


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([0.2, 2.0, 30.0]), st.lists(st.floats(0.0, 0.58), min_size=1), phases)
def test_nobody_is_lost_whose_signs_are_late(timeout_s: float, late: list[float], look_phase: float):
    """By less than 0.6 of the timeout, each of them, beyond the usual distance of two signs."""
    patience, signs = Patience(timeout_s), LifeSigns(timeout_s)
    signs.expect(OWNER)
    beats = [sum(2 * patience.sign_s + share * timeout_s for share in late[: n + 1]) for n in range(len(late))]
    signs.beat(OWNER, 0.0)
    now = look_phase * patience.look_s
    signs.advance(now)
    for beat in beats:
        while now < beat:
            assert signs.losses({HOME}, {OWNER}, lambda _: False) == []
            now += patience.look_s
            if now < beat:
                signs.advance(patience.look_s)
        signs.beat(OWNER, 0.0)
        signs.advance(patience.look_s)  # all of it, although the sign has come in the middle

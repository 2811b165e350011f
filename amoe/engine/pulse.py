"""The thread beside a worker's loop that speaks for it while it is inside one turn: `amoe.policy.patience`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from amoe.clock import Clock
from amoe.core.steps import Step
from amoe.engine.hindrance import Hindrance
from amoe.engine.messages import ControlPort, Pulse
from amoe.engine.step_times import StepTimes


@dataclass(slots=True)
class Turn:
    """Where the loop is. Written by the loop, read by the thread.

    Attributes:
        since: when the turn began; None: the loop sleeps.
        step: the step that it runs; None: it is at something else, which should take no time.
        signed_at: when the loop has given its last sign of life.
    """

    since: float | None = None
    step: Step | None = None
    signed_at: float = float("-inf")


class KeptFromRunning(Protocol):
    """See `amoe.engine.hindrance.Hindrance`."""

    def mark(self) -> None: ...

    def kept_s(self, seconds: float) -> float: ...


class PulseThread:
    """Runs while its `with` block does. Costs a few reads of attributes per period, unless a turn is long.

    Args:
        period_s: between signs of life, of the loop and of this thread.
        progress: goes up as a step gets on, if the steps here have parts: a number that may be asked for at any time.
        hindrance: what keeps the loop from running.
    """

    def __init__(
        self,
        turn: Turn,
        times: StepTimes,
        control: ControlPort,
        clock: Clock,
        period_s: float,
        progress: Callable[[], int] = lambda: 0,
        hindrance: KeptFromRunning | None = None,
    ) -> None:
        self._turn = turn
        self._times = times
        self._control = control
        self._clock = clock
        self._period_s = period_s
        self._progress = progress
        self._hindrance = hindrance or Hindrance()
        self._seen: tuple[float | None, bool, int] = (None, False, 0)  # the turn, is it at a step, how far is that
        self._since = 0.0  # it is there
        self._free_s = 0.0  # of that time, see `StepTime.free_s`
        self._marked_at: float | None = None  # what keeps it is looked at since then
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="amoe-pulse", daemon=True)

    def __enter__(self) -> PulseThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._period_s):
            self.look(self._control.send)

    def look(self, send: Callable[[Pulse], None]) -> None:
        """Send a pulse if the loop has given no sign for a period: a turn that is long is no silence, and a step that
        gets on no hang."""
        since, step, now = self._turn.since, self._turn.step, self._clock.now()
        self._follow(since, step is not None, now)
        if since is None or now - self._turn.signed_at < self._period_s:
            return
        self._watch(now)
        usual_s, longest_s = (0.0, None) if step is None else (self._times.usual_s(step), self._times.longest_s(step))
        send(Pulse(now - self._since, usual_s, self._free_s, longest_s))

    def _follow(self, since: float | None, in_step: bool, now: float) -> None:
        """Note since when the loop is where it is: in this turn, in its step, or in this part of the step."""
        seen, self._seen = self._seen, (since, in_step, self._progress())
        if self._seen == seen:
            return
        self._free_s, self._marked_at = 0.0, None
        self._since = since if since is not None and since != seen[0] else now

    def _watch(self, now: float) -> None:
        """Count for how long nothing has kept the loop, from the first long look at it on."""
        if self._marked_at is None:
            self._hindrance.mark()
        else:
            # Time in which this thread did not run either says nothing about the loop.
            seconds = min(now - self._marked_at, 2 * self._period_s)
            self._free_s += seconds - self._hindrance.kept_s(seconds)
        self._marked_at = now

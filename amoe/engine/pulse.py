"""The thread beside a worker's loop that tells how long the loop has been inside one turn: `amoe.engine.watchdog`."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from amoe.clock import Clock
from amoe.core.steps import ForwardStep, Step
from amoe.engine.messages import ControlPort, Pulse

PULSE_S = 0.5
LONG_TURN_S = 0.75  # the loop's own heartbeats speak for any shorter one

Kind = str | int  # name of a kind of block, or bits of a number of tokens


class StepTimes:
    """What steps have taken so far, by their kind: a block, or all blocks on about so many tokens.

    A token of a large step costs far less than one of a small step where each reads all weights of a model, so that a
    step of a size that has never been seen is the first of its kind.

    Args:
        num_layers: of a step on all blocks.
    """

    def __init__(self, num_layers: int = 1) -> None:
        self._num_layers = num_layers
        self._spent: dict[Kind, list[float]] = defaultdict(lambda: [0.0, 0])

    def observe(self, step: Step, seconds: float) -> None:
        """A step has run."""
        spent = self._spent[_kind_of(step)]
        spent[0] += seconds
        spent[1] += step.num_tokens

    def usual_s(self, step: Step) -> float | None:
        """What so many tokens have taken on average, in each layer if it was all; None: there have been none."""
        seconds, num_tokens = self._spent.get(_kind_of(step), (0.0, 0))
        num_parts = self._num_layers if isinstance(step, ForwardStep) else 1
        return seconds / num_tokens * step.num_tokens / num_parts if num_tokens else None


def _kind_of(step: Step) -> Kind:
    return step.num_tokens.bit_length() if isinstance(step, ForwardStep) else step.block.kind.name


@dataclass(slots=True)
class Turn:
    """Where the loop is. Written by the loop, read by the thread.

    Attributes:
        since: when the turn began; None: the loop sleeps.
        step: the step that it runs; None: it is at something else, which should take no time.
    """

    since: float | None = None
    step: Step | None = None


class PulseThread:
    """Runs while its `with` block does. Costs a few reads of attributes per half second, unless a turn is long.

    Args:
        progress: goes up as a step gets on, if the steps here have parts: a number that may be asked for at any time.
    """

    def __init__(
        self,
        turn: Turn,
        times: StepTimes,
        control: ControlPort,
        clock: Clock,
        progress: Callable[[], int] = lambda: 0,
    ) -> None:
        self._turn = turn
        self._times = times
        self._control = control
        self._clock = clock
        self._progress = progress
        self._seen: tuple[float | None, int] = (None, 0)  # the turn, and the progress in it
        self._since = 0.0  # it is there
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="amoe-pulse", daemon=True)

    def __enter__(self) -> PulseThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(PULSE_S):
            self.look(self._control.send)

    def look(self, send: Callable[[Pulse], None]) -> None:
        """Send a pulse if the turn is a long one: a step that gets on is a sign of life, not of a hang."""
        since, step, now = self._turn.since, self._turn.step, self._clock.now()
        self._follow(since, now)
        if since is None or now - since < LONG_TURN_S:
            return
        send(Pulse(now - self._since, 0.0 if step is None else self._times.usual_s(step)))

    def _follow(self, since: float | None, now: float) -> None:
        """Note since when the loop is where it is: in this turn, or in this part of its step."""
        seen, self._seen = self._seen, (since, self._progress())
        if since != seen[0]:
            self._since = now if since is None else since
        elif self._seen != seen:
            self._since = now

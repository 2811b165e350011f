"""Who is taken for dead, and when the next life begins. Pure bookkeeping: the caller says how much time has passed.

A worker gives signs of life twice a second: its loop a *heartbeat* between two steps, a thread beside it a *pulse*
while the loop is inside one turn. It is taken for dead if

- *silent*: it gives neither for the timeout. One that visibly uses a processor, or waits for one or for a disk, gets
  `RUNNING_TIMES` as long: a machine that is overloaded is no reason to kill anybody;
- *hung*: it is inside one step for longer than any step should take;
- *cut*: a home has waited for its answer for nearly the timeout, and says so again after two heartbeats of the accused
  that show that nothing waits there for as long: what the home has sent does not arrive, or the answer does not.

A cut link has two ends, and only one of them is replaced. If a home accuses all workers that hold experts, and they are
several, and no other home accuses any of them, it is the home that is cut off. Two that accuse each other: the greater
rank.

A worker that has died is started anew: at once, if its life was long; else after a pause that doubles with each life
that was short, so that a machine that is out of order is not kept busy by starting.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, NamedTuple

LossKind = Literal["silent", "hung", "cut"]

RUNNING_TIMES = 4.0
FIRST_SIGN_S = 30.0  # from "I am ready" to the first heartbeat, things may be warmed up
BEATS_OF_INNOCENCE = 2  # heartbeats that show that what was sent is not there
CUT_SHARE = 0.75  # of the timeout: homes say twice a second for how long they have waited
LAPSE_S = 1.5  # a home that has not said again that it waits, waits no more


class Loss(NamedTuple):
    """A worker that is taken for dead.

    Attributes:
        seconds: how long it has shown.
    """

    rank: int
    kind: LossKind
    seconds: float

    def __str__(self) -> str:
        how = {
            "silent": "has given no sign of life",
            "hung": "has been inside one step",
            "cut": "has not answered others that wait for it, and has nothing to do,",
        }
        return f"{how[self.kind]} for {self.seconds:.1f} s"


@dataclass(slots=True)
class _Signs:
    """Of one worker: seconds since the last one, and of the step that it is in."""

    silence_s: float = 0.0
    has_begun: bool = False
    step_s: float = 0.0
    step_limit_s: float = float("inf")


@dataclass(slots=True)
class _Accusation:
    """One home waits for one worker: for so many seconds when it said so last, which is so many seconds ago."""

    seconds: float
    age_s: float = 0.0
    beats: int = 0
    is_proven: bool = False


class LifeSigns:
    """See above.

    Args:
        timeout_s: of silence, and of an answer.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._workers: dict[int, _Signs] = {}
        self._accusations: dict[tuple[int, int], _Accusation] = {}

    def expect(self, rank: int) -> None:
        """A worker is ready."""
        self.forget(rank)
        self._workers[rank] = _Signs()

    def forget(self, rank: int) -> None:
        """A worker is gone, or about to leave: nothing is expected of it, and what it has said of others is void."""
        self._workers.pop(rank, None)
        for pair in [pair for pair in self._accusations if rank in pair]:
            del self._accusations[pair]

    def beat(self, rank: int, oldest_s: float) -> None:
        """A heartbeat has come.

        Args:
            oldest_s: how long the oldest token waits there for an expert; 0 if none does.
        """
        if (signs := self._workers.get(rank)) is None:
            return
        signs.silence_s, signs.has_begun = 0.0, True
        signs.step_s, signs.step_limit_s = 0.0, float("inf")
        for (_, accused), accusation in self._accusations.items():
            if accused == rank:
                has_it = oldest_s >= (accusation.seconds + accusation.age_s) / 2
                accusation.beats = 0 if has_it else accusation.beats + 1

    def pulse(self, rank: int, step_s: float, limit_s: float) -> None:
        """A pulse has come: the loop is `step_s` seconds into a step, or a layer of one, that may take `limit_s`."""
        if (signs := self._workers.get(rank)) is not None:
            signs.silence_s, signs.has_begun = 0.0, True
            signs.step_s, signs.step_limit_s = step_s, limit_s

    def accuse(self, home: int, rank: int, seconds: float) -> None:
        """`home` has waited for an answer of `rank` for `seconds`. It says so again as long as it waits."""
        if home not in self._workers or rank not in self._workers:
            return
        known = self._accusations.setdefault((home, rank), _Accusation(seconds))
        known.seconds, known.age_s = seconds, 0.0
        known.is_proven = known.beats >= BEATS_OF_INNOCENCE and seconds >= CUT_SHARE * self._timeout_s

    def advance(self, seconds: float) -> None:
        """So much time has passed, in which messages were read as they came."""
        for signs in self._workers.values():
            signs.silence_s += seconds
        for accusation in self._accusations.values():
            accusation.age_s += seconds
        for pair in [pair for pair, item in self._accusations.items() if item.age_s > LAPSE_S]:
            del self._accusations[pair]

    def losses(self, owners: set[int], seems_to_run: Callable[[int], bool]) -> list[Loss]:
        """Who is taken for dead now.

        Args:
            owners: ranks that hold experts, of those that are there.
            seems_to_run: whether a worker visibly uses a processor; asked only about those that are silent.
        """
        found = [loss for rank, signs in self._workers.items() if (loss := self._of_signs(rank, signs, seems_to_run))]
        return found + self._cut({loss.rank for loss in found}, owners)

    def _of_signs(self, rank: int, signs: _Signs, seems_to_run: Callable[[int], bool]) -> Loss | None:
        if signs.step_s >= signs.step_limit_s:
            return Loss(rank, "hung", signs.step_s)
        limit_s = self._timeout_s if signs.has_begun else max(self._timeout_s, FIRST_SIGN_S)
        if signs.silence_s < limit_s:
            return None
        if signs.silence_s < RUNNING_TIMES * limit_s and seems_to_run(rank):
            return None
        return Loss(rank, "silent", signs.silence_s)

    def _cut(self, dead: set[int], owners: set[int]) -> list[Loss]:
        """Whoever waits for a worker that is dead anyway has nothing new to say."""
        proven = {
            pair: item.seconds for pair, item in self._accusations.items() if item.is_proven and dead.isdisjoint(pair)
        }
        worst: dict[int, float] = {}
        for pair, seconds in proven.items():
            rank = _culprit(pair, proven, owners)
            worst[rank] = max(seconds, worst.get(rank, 0.0))
        return [Loss(rank, "cut", seconds) for rank, seconds in sorted(worst.items())]


def _culprit(pair: tuple[int, int], proven: Collection[tuple[int, int]], owners: set[int]) -> int:
    """Which end of a link that is cut is replaced, of all that are `proven` to be."""
    home, accused = pair
    others = owners - {home}
    if len(others) > 1 and {rank for by, rank in proven if by == home} >= others:
        return accused if any(by != home for by, _ in proven) else home
    return max(pair) if (accused, home) in proven else accused


@dataclass(frozen=True, kw_only=True, slots=True)
class Crashes:
    """The short lives of one rank.

    Attributes:
        count: deaths in a row, each after less than `max_backoff_s` of service.
    """

    backoff_s: float
    max_backoff_s: float
    count: int = 0

    def after(self, lived_s: float) -> Crashes:
        """One more life is over, after so many seconds of service; 0: it never served."""
        count = 1 if lived_s >= self.max_backoff_s else self.count + 1
        return Crashes(backoff_s=self.backoff_s, max_backoff_s=self.max_backoff_s, count=count)

    def forgiven(self) -> Crashes:
        """The present life is long enough."""
        return Crashes(backoff_s=self.backoff_s, max_backoff_s=self.max_backoff_s)

    @property
    def pause_s(self) -> float:
        """Seconds to wait before the next life: none after the first death."""
        if self.count <= 1:
            return 0.0
        return min(self.max_backoff_s, self.backoff_s * 2.0 ** min(self.count - 2, 60))

"""Who is taken for dead, and when the next life begins. Pure bookkeeping: the caller says how much time has passed.

A worker gives signs of life: its loop between two steps, a thread beside it by a *pulse* while the loop is inside one
turn. It is taken for dead if

- *silent*: it gives neither. One that visibly uses a processor, or waits for one or for a disk, gets `RUNNING_TIMES` as
  long: a machine that is overloaded is no reason to kill anybody;
- *hung*: it is inside one step for longer than any step should take;
- *cut*: a home has waited for its answer, and says so again after two signs of the accused that show that nothing waits
  there for as long: what the home has sent does not arrive, or the answer does not.

How long each takes, and why: `amoe.policy.patience`.

A cut link has two ends, and only one of them is replaced: the one that is waited for; of two that wait for each other
the greater rank. But if all links that are cut end at one worker, and it has such a link with everybody else who holds
experts, it is that worker which is cut off: if these are several, or if it holds none itself and there is another home,
which waits for nobody.

A worker that has died is started anew: at once, if its life was long; else after a pause that doubles with each life
that was short, so that a machine that is out of order is not kept busy by starting.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, NamedTuple

from amoe.policy.patience import Patience, StepTime

LossKind = Literal["silent", "hung", "cut"]

RUNNING_TIMES = 4.0
FIRST_SIGN_S = 30.0  # from "I am ready" to the first sign of life, things may be warmed up
BEATS_OF_INNOCENCE = 2  # signs of a loop that show that what was sent is not there
REPORTS = 2  # a home that waits says so again within so many periods, unless its turns are long


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
            "cut": "is cut off: no answer has come from it, or none to it,",
        }
        return f"{how[self.kind]} for {self.seconds:.1f} s"


def can_serve(num_homes: int, num_owners: int, num_missing: int, *, degrades: bool) -> bool:
    """Whether tokens can be served by the workers that are there.

    Args:
        num_homes, num_owners: workers that have sequences, and that hold experts.
        num_missing: (layer, expert) pairs that nobody holds.
        degrades: tokens go on without experts that nobody holds, rather than wait for them.
    """
    return num_homes > 0 and num_owners > 0 and (num_missing == 0 or degrades)


@dataclass(slots=True)
class _Signs:
    """Of one worker: seconds since the last one, the step that it has not come out of since, and for how long its links
    may not be there yet."""

    silence_s: float = 0.0
    linking_s: float = 0.0
    has_begun: bool = False
    step: StepTime | None = None


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
        timeout_s: within which a loss shall be told.
    """

    def __init__(self, timeout_s: float) -> None:
        self._patience = Patience(timeout_s)
        self._workers: dict[int, _Signs] = {}
        self._accusations: dict[tuple[int, int], _Accusation] = {}

    def expect(self, rank: int, linking_s: float = 0.0) -> None:
        """A worker is ready. Its links may take `linking_s` to come about: until then nobody waits for it in vain, nor
        it for anybody."""
        self.forget(rank)
        self._workers[rank] = _Signs(linking_s=linking_s)

    def forget(self, rank: int) -> None:
        """A worker is gone, or about to leave: nothing is expected of it, and what it has said of others is void."""
        self._workers.pop(rank, None)
        for pair in [pair for pair in self._accusations if rank in pair]:
            del self._accusations[pair]

    def beat(self, rank: int, oldest_s: float) -> None:
        """The loop turns: a sign of it has come.

        Args:
            oldest_s: how long the oldest token waits there for an expert; 0 if none does.
        """
        if (signs := self._workers.get(rank)) is None:
            return
        signs.silence_s, signs.has_begun, signs.step = 0.0, True, None
        for (_, accused), accusation in self._accusations.items():
            if accused == rank:
                has_it = oldest_s >= (accusation.seconds + accusation.age_s) / 2
                accusation.beats = 0 if has_it else accusation.beats + 1

    def pulse(self, rank: int, step: StepTime) -> None:
        """A pulse has come: the loop is inside a step."""
        if (signs := self._workers.get(rank)) is not None:
            signs.silence_s, signs.has_begun, signs.step = 0.0, True, step

    def accuse(self, home: int, rank: int, seconds: float) -> None:
        """`home` has waited for an answer of `rank` for `seconds`. It says so again as long as it waits."""
        ends = (self._workers.get(home), self._workers.get(rank))
        if any(signs is None or signs.linking_s > 0 for signs in ends):
            return
        known = self._accusations.setdefault((home, rank), _Accusation(seconds))
        known.seconds, known.age_s = seconds, 0.0
        known.is_proven = known.beats >= BEATS_OF_INNOCENCE and seconds >= self._patience.answer_s

    def advance(self, seconds: float) -> None:
        """So much time has passed, in which messages were read as they came."""
        for signs in self._workers.values():
            signs.silence_s += seconds
            signs.linking_s = max(0.0, signs.linking_s - seconds)
        for accusation in self._accusations.values():
            accusation.age_s += seconds
        for pair in [pair for pair, item in self._accusations.items() if item.age_s > self._patience.lapse_s]:
            del self._accusations[pair]

    def losses(self, homes: set[int], owners: set[int], seems_to_run: Callable[[int], bool]) -> list[Loss]:
        """Who is taken for dead now.

        Args:
            homes, owners: ranks that have sequences, and that hold experts, of those that are there.
            seems_to_run: whether a worker visibly uses a processor; asked only about those that are silent.
        """
        found = [loss for rank, signs in self._workers.items() if (loss := self._of_signs(rank, signs, seems_to_run))]
        return found + self._cut({loss.rank for loss in found}, homes, owners)

    def _of_signs(self, rank: int, signs: _Signs, seems_to_run: Callable[[int], bool]) -> Loss | None:
        if signs.step is not None and self._patience.is_hung(signs.step):
            return Loss(rank, "hung", signs.step.step_s)
        silence_s = self._patience.silence_s
        limit_s = silence_s if signs.has_begun else max(silence_s, FIRST_SIGN_S)
        if signs.silence_s < limit_s:
            return None
        if signs.silence_s < RUNNING_TIMES * limit_s and seems_to_run(rank):
            return None
        return Loss(rank, "silent", signs.silence_s)

    def _cut(self, dead: set[int], homes: set[int], owners: set[int]) -> list[Loss]:
        """Whoever waits for a worker that is dead anyway has nothing new to say."""
        alive = {pair: item for pair, item in self._accusations.items() if dead.isdisjoint(pair)}
        latest_s = REPORTS * self._patience.sign_s
        founded = {p for p, item in alive.items() if item.beats >= BEATS_OF_INNOCENCE and item.age_s <= latest_s}
        worst: dict[int, float] = {}
        for pair, item in alive.items():
            if item.is_proven:
                rank = _culprit(pair, founded | {pair}, homes, owners)
                worst[rank] = max(item.seconds, worst.get(rank, 0.0))
        return [Loss(rank, "cut", seconds) for rank, seconds in sorted(worst.items())]


def _culprit(pair: tuple[int, int], founded: Collection[tuple[int, int]], homes: set[int], owners: set[int]) -> int:
    """Which end of a link that is cut is replaced.

    Args:
        founded: accusations of which all but the time is proven: who has sent something to each of the others, one
            after the other, has waited for each a little less long.
    """
    home, accused = pair
    for rank in pair:
        if _is_isolated(rank, founded, homes, owners):
            return rank
    return max(pair) if (accused, home) in founded else accused


def _is_isolated(rank: int, founded: Collection[tuple[int, int]], homes: set[int], owners: set[int]) -> bool:
    """Whether nobody reaches a worker, as far as anybody has tried."""
    others = owners - {rank}
    beyond = {end for pair in founded if rank in pair for end in pair}
    if not others or not beyond >= others or not all(rank in pair for pair in founded):
        return False
    return len(others) > 1 or (rank not in owners and len(homes) > 1)


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

"""Where the experts of one layer live, and how to change that with few moves.

A *copy* is one expert at one owner. The holders of an expert share its load by their speeds, so that it takes each of
them as long: the expert's load, divided by the sum of their speeds (by the number of copies, where all are as fast). A
*step* gives one owner a copy that it has not held, which is what costs time, since somebody has to read it. Steps are
taken best first: the one that relieves the busiest owner most per copy read. A step is taken only if it relieves it by
more than `MIN_GAIN` of an even share for each copy: what gains less is noise, and is not worth the reading.

Shape letters: E experts, D owners.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from amoe.errors import ConfigError
from amoe.types import BoolArray, Int64Array

FloatArray = npt.NDArray[np.float64]

MIN_GAIN = 0.02
# Kinds of steps: a copy goes from one owner to another, one more is made, or two owners exchange theirs.
MOVE, COPY, EXCHANGE = "move", "copy", "exchange"
ALL_KINDS = frozenset({MOVE, COPY, EXCHANGE})
# What is never asked for has to live somewhere too, and may be asked for next: so much of an even share each is added.
_PRIOR = 0.05
_MAX_STEPS_PER_COPY = 4
_NO_SPEED = 1e-9


class _Step(NamedTuple):
    """One change: `relief` of the busier one per copy read; then who holds what no more, and who does."""

    relief: float
    removed: tuple[tuple[int, int], ...]  # (expert, owner)
    added: tuple[tuple[int, int], ...]


class LayerPlan:
    """The copies of one layer, while they are planned.

    Args:
        load: [E] share or count of pairs; all zero: nothing is known of them.
        holds: [E, D] who holds what; those who are not `present` [D] lose all.
        slots: experts that an owner can hold.
        wanted_copies: of all experts together: no step leaves fewer, and `fill` makes as many.
        max_copies: of all experts together; more than that may stay, but are not made.
        speed: [D] of the owners, > 0; 1 is usual.

    Raises:
        ConfigError: the owners that are present have not the slots for all experts.
    """

    def __init__(
        self,
        load: FloatArray,
        holds: BoolArray,
        present: BoolArray,
        slots: int,
        wanted_copies: int,
        max_copies: int,
        speed: FloatArray,
    ) -> None:
        num_experts = len(load)
        mean = float(load.mean())
        self.load: FloatArray = (load / mean if mean > 0 else np.ones(num_experts)) + _PRIOR
        self.holds: BoolArray = holds & present
        self._present = present
        self._slots = min(slots, num_experts)
        self._wanted_copies = wanted_copies
        self._max_copies = max_copies
        self._speed = speed
        num_present = int(present.sum())
        if num_present * self._slots < num_experts:
            raise ConfigError(
                f"{num_present} expert workers with room for {slots} experts of a layer each cannot hold {num_experts}"
            )
        self._enough = MIN_GAIN * float(self.load.sum()) / float(speed[present].sum())

    @property
    def copies(self) -> Int64Array:
        """[E] of each expert."""
        return self.holds.sum(axis=1)

    @property
    def busy(self) -> FloatArray:
        """[D] how long each owner takes."""
        return self._parts @ self.holds

    @property
    def _capacity(self) -> FloatArray:
        """[E] speeds of those who hold an expert, together."""
        return self.holds @ self._speed

    @property
    def _parts(self) -> FloatArray:
        """[E] how long each of its holders takes for an expert."""
        return self._shared(self._capacity)

    def _shared(self, capacity: FloatArray) -> FloatArray:
        """[E, ...] the same, if the holders had these speeds [E, ...] together; 0 where nobody holds it."""
        load = self.load.reshape(-1, *[1] * (capacity.ndim - 1))
        return np.where(capacity > _NO_SPEED, load / np.maximum(capacity, _NO_SPEED), 0.0)

    @property
    def _room(self) -> Int64Array:
        """[D] copies that an owner can take."""
        return np.where(self._present, self._slots - self.holds.sum(axis=0), 0)

    # -- what has to be ----------------------------------------------------------------------------------------------

    def settle(self, preferred: BoolArray) -> None:
        """Somebody holds every expert, and nobody more than he can. `preferred` [D] owners take what has to go."""
        self._shed()
        orphans = np.flatnonzero(self.copies == 0)
        for expert in orphans[np.argsort(-self.load[orphans], kind="stable")].tolist():
            self._house(expert, preferred)

    def _shed(self) -> None:
        """Whoever holds too much drops spare copies first, then what is lightest."""
        for owner in np.flatnonzero(self.holds.sum(axis=0) > self._slots).tolist():
            for _ in range(int(self.holds[:, owner].sum()) - self._slots):
                here = self.holds[:, owner]
                spare = here & (self.copies > 1)
                among = spare if spare.any() else here
                self.holds[int(np.where(among, self._parts, np.inf).argmin()), owner] = False

    def _house(self, expert: int, preferred: BoolArray) -> None:
        """The least busy owner with room takes an expert that nobody holds."""
        if not (self._room > 0).any():
            self.holds[self._cheapest_spare(self._present)] = False
        room = self._room > 0
        among = room & preferred if (room & preferred).any() else room
        later = self.busy + self.load[expert] / self._speed
        self.holds[expert, int(np.where(among, later, np.inf).argmin())] = True

    def fill(self, targets: BoolArray) -> None:
        """Make copies at `targets` [D] that have room until there are as many as are wanted: of what has the fewest,
        and of that the hottest. That a loss costs nobody a wait is worth it, even where nobody is relieved."""
        while int(self.copies.sum()) < self._wanted_copies:
            places = ~self.holds & (targets & self._present & (self._room > 0))
            if not places.any():
                return
            copies = np.where(places.any(axis=1), self.copies, np.iinfo(np.int64).max)
            expert = int(np.where(copies == copies.min(), self.load, -1.0).argmax())
            self.holds[expert, int(np.where(places[expert], self.busy, np.inf).argmin())] = True

    def _cheapest_spare(self, owners: BoolArray) -> tuple[int, int]:
        """(expert, owner) of the copy at one of `owners` [D] that burdens the others least if it goes."""
        spare = self.holds & owners & (self.copies > 1)[:, None]
        burden = np.where(spare, self._burden(), np.inf)
        expert = int(burden.min(axis=1).argmin())
        return expert, int(np.where(burden[expert] == burden[expert].min(), self.busy, -1.0).argmax())

    def _burden(self) -> FloatArray:
        """[E, D] how much longer each other holder would take, without the copy of this one."""
        return self._shared(self._capacity[:, None] - self._speed) - self._parts[:, None]

    # -- what is better ----------------------------------------------------------------------------------------------

    def improve(self, targets: BoolArray, kinds: frozenset[str] = ALL_KINDS) -> None:
        """Take steps of these kinds that give `targets` [D] a copy, until none is worth it."""
        for _ in range(_MAX_STEPS_PER_COPY * len(self.load)):
            busy = self.busy
            for hot in np.argsort(-busy, kind="stable").tolist():
                if busy[hot] <= busy[self._present].mean() or (step := self._best(hot, targets, kinds)) is None:
                    continue
                for place in step.removed:
                    self.holds[place] = False
                for place in step.added:
                    self.holds[place] = True
                break
            else:
                return

    def _best(self, hot: int, targets: BoolArray, kinds: frozenset[str]) -> _Step | None:
        """The step that relieves `hot` most for what it costs."""
        steps: list[_Step] = []
        for target in np.flatnonzero(targets & self._present).tolist():
            if target != hot:
                steps += self._steps(hot, target, kinds)
        best = max(steps, key=lambda step: step.relief, default=None)
        return best if best is not None and best.relief > self._enough else None

    def _steps(self, hot: int, target: int, kinds: frozenset[str]) -> list[_Step]:
        """The best step of every kind between two owners."""
        busy, copies = self.busy, self.copies
        here, there, others = float(busy[hot]), float(busy[target]), 0.0
        candidates = self.holds[:, hot] & ~self.holds[:, target]
        evicted: tuple[tuple[int, int], ...] = ()
        steps = self._exchanges(hot, target, candidates) if EXCHANGE in kinds else []
        if self._room[target] <= 0:
            if not (self.holds[:, target] & (copies > 1)).any():
                return steps
            spare, _ = self._cheapest_spare(np.arange(len(busy)) == target)
            burden = float(self._burden()[spare, target])
            if self.holds[spare, hot]:
                here += burden
            there -= float(self._parts[spare])
            bystanders = self.holds[spare].copy()
            bystanders[[hot, target]] = False
            others = float(busy[bystanders].max(initial=0.0)) + burden
            evicted = ((spare, target),)
        parts, capacity = self._parts, self._capacity
        if MOVE in kinds and (not evicted or int(copies.sum()) > self._wanted_copies):
            moved = self._shared(capacity - self._speed[hot] + self._speed[target])
            longer = np.maximum(np.maximum(here - parts, there + moved), others)
            longer = np.maximum(longer, self._bystanders(hot, target, moved))
            steps += self._chosen(hot, candidates, longer, target, evicted, moves=True)
        if COPY in kinds and int(copies.sum()) - len(evicted) < self._max_copies:
            smaller = self._shared(capacity + self._speed[target])
            longer = np.maximum(np.maximum(here - parts + smaller, there + smaller), others)
            steps += self._chosen(hot, candidates, longer, target, evicted, moves=False)
        return steps

    def _bystanders(self, hot: int, target: int, parts: FloatArray) -> FloatArray:
        """[E] how long the busiest of its other holders would take, if each took `parts` [E] for the expert, where that
        is longer than now: it has gone from a fast one to a slow one. Elsewhere 0."""
        busy = np.where(self.holds, self.busy, 0.0)
        busy[:, [hot, target]] = 0.0
        worst, more = busy.max(axis=1), parts - self._parts
        return np.where((more > 0) & (worst > 0), worst + more, 0.0)

    def _chosen(
        self,
        hot: int,
        candidates: BoolArray,
        longer: FloatArray,
        target: int,
        evicted: tuple[tuple[int, int], ...],
        *,
        moves: bool,
    ) -> list[_Step]:
        """The candidate [E] with the least `longer` [E], the load of the busiest owner concerned."""
        if not candidates.any():
            return []
        expert = int(np.where(candidates, longer, np.inf).argmin())
        gone = ((expert, hot),) if moves else ()
        return [_Step(float(self.busy[hot] - longer[expert]), evicted + gone, ((expert, target),))]

    def _exchanges(self, hot: int, target: int, mine: BoolArray) -> list[_Step]:
        """A copy of `hot` for a lighter one of `target`: two copies are read."""
        parts, busy = self._parts, self.busy
        to_target = self._shared(self._capacity - self._speed[hot] + self._speed[target])
        to_hot = self._shared(self._capacity - self._speed[target] + self._speed[hot])
        theirs = self.holds[:, target] & ~self.holds[:, hot]
        experts, others = np.flatnonzero(mine), np.flatnonzero(theirs)
        if len(experts) == 0 or len(others) == 0:
            return []
        at_hot = busy[hot] - parts[experts, None] + to_hot[others]
        longer = np.maximum(at_hot, busy[target] + to_target[experts, None] - parts[others])
        longer = np.maximum(longer, self._bystanders(hot, target, to_target)[experts, None])
        longer = np.maximum(longer, self._bystanders(hot, target, to_hot)[others])
        i, j = np.unravel_index(int(longer.argmin()), longer.shape)
        expert, other = int(experts[i]), int(others[j])
        relief = float(busy[hot] - longer[i, j]) / 2
        return [_Step(relief, ((expert, hot), (other, target)), ((expert, target), (other, hot)))]

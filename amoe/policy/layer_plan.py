"""Where the experts of one layer live, and how to change that with few moves.

A *copy* is one expert at one owner. A copy's load is its expert's, divided by the number of copies. A *step* gives one
owner a copy that it has not held, which is what costs time, since somebody has to read it. Steps are taken best first:
the one that relieves the busiest owner most per copy read. A step is taken only if it relieves it by more than
`MIN_GAIN` of an even share for each copy: what gains less is noise, and is not worth the reading.

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


class _Step(NamedTuple):
    """One change: `relief` of the busier one's load per copy read; then who holds what no more, and who does."""

    relief: float
    removed: tuple[tuple[int, int], ...]  # (expert, owner)
    added: tuple[tuple[int, int], ...]


class LayerPlan:
    """The copies of one layer, while they are planned.

    Args:
        load: [E] share or count of pairs; all zero: nothing is known of them.
        holds: [E, D] who holds what; those who are not `present` [D] lose all.
        slots: experts that an owner can hold.
        max_copies: of all experts together; more than that may stay, but are not made.

    Raises:
        ConfigError: the owners that are present have not the slots for all experts.
    """

    def __init__(self, load: FloatArray, holds: BoolArray, present: BoolArray, slots: int, max_copies: int) -> None:
        num_experts = len(load)
        mean = float(load.mean())
        self.load: FloatArray = (load / mean if mean > 0 else np.ones(num_experts)) + _PRIOR
        self.holds: BoolArray = holds & present
        self._present = present
        self._slots = min(slots, num_experts)
        self._max_copies = max_copies
        num_present = int(present.sum())
        if num_present * self._slots < num_experts:
            raise ConfigError(
                f"{num_present} expert workers with room for {slots} experts of a layer each cannot hold {num_experts}"
            )
        self._enough = MIN_GAIN * float(self.load.sum()) / num_present

    @property
    def copies(self) -> Int64Array:
        """[E] of each expert."""
        return self.holds.sum(axis=1)

    @property
    def busy(self) -> FloatArray:
        """[D] load of each owner."""
        return (self.load / np.maximum(self.copies, 1)) @ self.holds

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
                self.holds[int(np.where(among, self.load / self.copies.clip(1), np.inf).argmin()), owner] = False

    def _house(self, expert: int, preferred: BoolArray) -> None:
        """The least busy owner with room takes an expert that nobody holds."""
        if not (self._room > 0).any():
            self.holds[self._cheapest_spare(self._present)] = False
        room = self._room > 0
        among = room & preferred if (room & preferred).any() else room
        self.holds[expert, int(np.where(among, self.busy, np.inf).argmin())] = True

    def _cheapest_spare(self, owners: BoolArray) -> tuple[int, int]:
        """(expert, owner) of the copy at one of `owners` [D] that burdens the others least if it goes."""
        spare = self.holds & owners & (self.copies > 1)[:, None]
        expert = int(np.where(spare.any(axis=1), self._burden(), np.inf).argmin())
        return expert, int(np.where(spare[expert], self.busy, -1.0).argmax())

    def _burden(self) -> FloatArray:
        """[E] what each other copy has to do more, once there is one less."""
        copies = self.copies
        return self.load / np.maximum(copies * (copies - 1), 1)

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
            burden = float(self._burden()[spare])
            if self.holds[spare, hot]:
                here += burden
            there -= float(self.load[spare] / copies[spare])
            bystanders = self.holds[spare].copy()
            bystanders[[hot, target]] = False
            others = float(busy[bystanders].max(initial=0.0)) + burden
            evicted = ((spare, target),)
        parts = self.load / np.maximum(copies, 1)
        if MOVE in kinds:
            longer = np.maximum(np.maximum(here - parts, there + parts), others)
            steps += self._chosen(hot, candidates, longer, target, evicted, moves=True)
        if COPY in kinds and int(copies.sum()) - len(evicted) < self._max_copies:
            smaller = self.load / (copies + 1)
            longer = np.maximum(np.maximum(here - parts + smaller, there + smaller), others)
            steps += self._chosen(hot, candidates, longer, target, evicted, moves=False)
        return steps

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
        parts, busy = self.load / np.maximum(self.copies, 1), self.busy
        theirs = self.holds[:, target] & ~self.holds[:, hot]
        experts, others = np.flatnonzero(mine), np.flatnonzero(theirs)
        if len(experts) == 0 or len(others) == 0:
            return []
        moved = parts[experts, None] - parts[others]
        longer = np.maximum(busy[hot] - moved, busy[target] + moved)
        i, j = np.unravel_index(int(longer.argmin()), longer.shape)
        expert, other = int(experts[i]), int(others[j])
        relief = float(busy[hot] - longer[i, j]) / 2
        return [_Step(relief, ((expert, hot), (other, target)), ((expert, target), (other, hot)))]

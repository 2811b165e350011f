"""The join: a token waits at home until every worker that it was dispatched to has answered.

Tokens wait in groups: a decode token is a group of its own, the tokens of a prefill chunk are one group, so that a
chunk enters the next attention block as a whole (a causal join inside one sequence). A group is named by its leader's
slot and counts the answers that its tokens still wait for.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from amoe.types import BoolArray, Int16Array, Int32Array, Int64Array


class Join:
    """Outstanding answers of `num_slots` tokens from `num_owners` expert workers.

    Attributes:
        dispatched: [S, D] owners that hold a part of the token's sum at the layer where it stands. The combine reads
            it, in the order of owners, so that the result does not depend on the order of arrival.
        lane: [S] the set of μ-queues through which the token goes: its wave, or the loose lane.
        outstanding: [num_lanes] answers that tokens of the lane wait for: a lane is at home when it is 0.
        layer: [S] where the token was dispatched last; asked_at: [S] when.
    """

    def __init__(self, num_slots: int, num_owners: int, num_lanes: int = 1) -> None:
        self.lane: Int16Array = np.zeros(num_slots, np.int16)
        self.outstanding: Int64Array = np.zeros(num_lanes, np.int64)
        self.dispatched: BoolArray = np.zeros((num_slots, num_owners), np.bool_)
        self._awaiting: BoolArray = np.zeros((num_slots, num_owners), np.bool_)
        self._pending: Int32Array = np.zeros(num_slots, np.int32)  # by leader
        self.layer: Int32Array = np.full(num_slots, -1, np.int32)
        self._opened_at = np.zeros(num_slots)
        self.asked_at = np.zeros(num_slots)
        self._answer: Int32Array = np.zeros(num_slots, np.int32)  # scratch: a row of the batch that answers the slot

    def open(self, slots: Int32Array, leaders: Int32Array, layer: int, dispatched: BoolArray, now: float) -> None:
        """Tokens [n] are about to be dispatched to the owners in `dispatched` [n, D]. Comes with whole groups."""
        self.dispatched[slots] = dispatched
        self._awaiting[slots] = dispatched
        self.layer[slots] = layer
        self._opened_at[leaders] = now
        self.asked_at[slots] = now
        num_answers = dispatched.sum(axis=1, dtype=np.int32)
        np.add.at(self._pending, leaders, num_answers)
        self._count(self.lane[slots], num_answers)

    def accept(self, slots: Int32Array, current: BoolArray, layer: int, owner: int) -> BoolArray:
        """Answers for `slots` [n] have come from `owner`; `current` [n] tells which slots still mean what they meant.

        Returns:
            [n]: the answer is awaited. The others are late or duplicates and must change nothing.
        """
        accepted: BoolArray = current & self._awaiting[slots, owner] & (self.layer[slots] == layer)
        # A dispatch that came twice before its experts ran is answered twice in one batch: one of them counts.
        rows = np.flatnonzero(accepted)
        self._answer[slots[rows]] = rows
        accepted[rows] = self._answer[slots[rows]] == rows
        return accepted

    def settle(self, slots: Int32Array, leaders: Int32Array, owner: int) -> Int32Array:
        """Accepted answers [n] are in.

        Returns:
            [m] leaders of the groups that now wait for nothing, each once, ascending.
        """
        self._awaiting[slots, owner] = False
        np.subtract.at(self._pending, leaders, 1)
        self.outstanding -= np.bincount(self.lane[slots], minlength=len(self.outstanding))
        return self.idle(leaders)

    def idle(self, leaders: Int32Array) -> Int32Array:
        """[m] of the groups of `leaders` [n] that wait for nothing, each once, ascending."""
        return np.unique(leaders[self._pending[leaders] == 0])

    def waits(self, leaders: Int32Array, now: float) -> npt.NDArray[np.float64]:
        """[n] seconds since the groups were dispatched."""
        return now - self._opened_at[leaders]

    def cancel(self, slots: Int32Array) -> None:
        """Slots [n] are given back: whatever they waited for is forgotten."""
        self._count(self.lane[slots], -self._awaiting[slots].sum(axis=1, dtype=np.int32))
        self._awaiting[slots] = False
        self._pending[slots] = 0
        self.layer[slots] = -1

    def reopen(self, slots: Int32Array, leaders: Int32Array, layer: int, dispatched: BoolArray, now: float) -> None:
        """What tokens [n] waited for is forgotten, and they are dispatched once more. Their groups may be larger."""
        num_answers = self._awaiting[slots].sum(axis=1, dtype=np.int32)
        np.subtract.at(self._pending, leaders, num_answers)
        self._count(self.lane[slots], -num_answers)
        self.open(slots, leaders, layer, dispatched, now)

    def owed_by(self, owners: BoolArray) -> Int32Array:
        """[n] slots of the tokens that wait for an answer of any of `owners` [D]."""
        return np.flatnonzero(self._awaiting[:, owners].any(axis=1)).astype(np.int32)

    def awaits(self, owner: int) -> BoolArray:
        """[S] the token in a slot waits for an answer of an owner."""
        return self._awaiting[:, owner]

    def oldest_by_owner(self) -> npt.NDArray[np.float64]:
        """[D] when the oldest of the tokens that wait for an owner's answer was dispatched; +inf: none waits."""
        slots = np.flatnonzero(self._awaiting.any(axis=1))  # few, as a rule, of very many
        asked_at = np.where(self._awaiting[slots], self.asked_at[slots, None], np.inf)
        return asked_at.min(axis=0, initial=np.inf)

    def part_with(self, leaders: Int32Array, loose: int, leader_of: Int32Array) -> None:
        """The groups of `leaders` [n] belong to the lane `loose` from now on; `leader_of` [S] of all slots."""
        slots = np.flatnonzero(np.isin(leader_of, leaders))  # those whose answers are in go on with the others
        num_answers = self._awaiting[slots].sum(axis=1, dtype=np.int32)
        self._count(self.lane[slots], -num_answers)
        self.lane[slots] = loose
        self._count(self.lane[slots], num_answers)

    def loosen(self, lane: int, loose: int, leaders: Int32Array) -> BoolArray:
        """Tokens of a lane that are still away belong to the lane `loose` from now on; `leaders` [S] of all slots.

        Returns:
            [D] owners that owe them an answer.
        """
        away = np.flatnonzero((self.lane == lane) & (self._pending[leaders] > 0))
        self.lane[away] = loose
        self.outstanding[loose] += self.outstanding[lane]
        self.outstanding[lane] = 0
        return np.asarray(self._awaiting[away].any(axis=0))

    def _count(self, lanes: Int16Array, num_answers: Int32Array) -> None:
        counts = np.bincount(lanes, num_answers, len(self.outstanding))
        self.outstanding += counts.astype(np.int64)

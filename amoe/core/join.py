"""The join: a token waits at home until every worker that it was dispatched to has answered.

Tokens wait in groups: a decode token is a group of its own, the tokens of a prefill chunk are one group, so that a
chunk enters the next attention block as a whole (a causal join inside one sequence). A group is named by its leader's
slot and counts the answers that its tokens still wait for.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from amoe.types import BoolArray, Int32Array


class Join:
    """Outstanding answers of `num_slots` tokens from `num_owners` expert workers.

    Attributes:
        dispatched: [S, D] owners that hold a part of the token's sum at the layer where it stands. The combine reads
            it, in the order of owners, so that the result does not depend on the order of arrival.
    """

    def __init__(self, num_slots: int, num_owners: int) -> None:
        self.dispatched: BoolArray = np.zeros((num_slots, num_owners), np.bool_)
        self._awaiting: BoolArray = np.zeros((num_slots, num_owners), np.bool_)
        self._pending: Int32Array = np.zeros(num_slots, np.int32)  # by leader
        self._layer: Int32Array = np.full(num_slots, -1, np.int32)
        self._opened_at = np.zeros(num_slots)
        self._answer: Int32Array = np.zeros(num_slots, np.int32)  # scratch: a row of the batch that answers the slot

    def open(self, slots: Int32Array, leaders: Int32Array, layer: int, dispatched: BoolArray, now: float) -> None:
        """Tokens [n] are about to be dispatched to the owners in `dispatched` [n, D]. Comes with whole groups."""
        self.dispatched[slots] = dispatched
        self._awaiting[slots] = dispatched
        self._layer[slots] = layer
        self._opened_at[leaders] = now
        np.add.at(self._pending, leaders, dispatched.sum(axis=1, dtype=np.int32))

    def accept(self, slots: Int32Array, current: BoolArray, layer: int, owner: int) -> BoolArray:
        """Answers for `slots` [n] have come from `owner`; `current` [n] tells which slots still mean what they meant.

        Returns:
            [n]: the answer is awaited. The others are late or duplicates and must change nothing.
        """
        accepted: BoolArray = current & self._awaiting[slots, owner] & (self._layer[slots] == layer)
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
        return np.unique(leaders[self._pending[leaders] == 0])

    def waits(self, leaders: Int32Array, now: float) -> npt.NDArray[np.float64]:
        """[n] seconds since the groups were dispatched."""
        return now - self._opened_at[leaders]

    def cancel(self, slots: Int32Array) -> None:
        """Slots [n] are given back: whatever they waited for is forgotten."""
        self._awaiting[slots] = False
        self._pending[slots] = 0
        self._layer[slots] = -1

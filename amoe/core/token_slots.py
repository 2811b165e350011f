"""Token slots: indices of in-flight tokens in the tables of their home worker, and what is known of each."""

from __future__ import annotations

import numpy as np

from amoe.types import BoolArray, Int32Array


class TokenSlots:
    """A fixed number of slots, each with a generation that moves on whenever what the slot means changes.

    An answer that names a slot with an old generation is late: its token is gone, or is in a later iteration.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.generation: Int32Array = np.zeros(num_slots, np.int32)
        self._free: Int32Array = np.arange(num_slots - 1, -1, -1, dtype=np.int32)
        self._num_free = num_slots

    @property
    def num_free(self) -> int:
        return self._num_free

    def allocate(self, count: int) -> Int32Array:
        """Take `count` slots, [count]. The caller has checked `num_free`."""
        assert count <= self._num_free, f"{count} slots asked for, {self._num_free} free"
        self._num_free -= count
        return self._free[self._num_free : self._num_free + count].copy()

    def release(self, slots: Int32Array) -> None:
        """Give slots [n] back; whatever is still on its way for them is late from now on."""
        assert self._num_free + len(slots) <= self.num_slots, "more slots released than there are"
        self.generation[slots] += 1
        self._free[self._num_free : self._num_free + len(slots)] = slots
        self._num_free += len(slots)

    def renew(self, slots: Int32Array) -> None:
        """Start the next iteration in the same slots [n]."""
        self.generation[slots] += 1

    def is_current(self, slots: Int32Array, generations: Int32Array) -> BoolArray:
        """[n]: the slot still means what it meant when `generations` was read."""
        return self.generation[slots] == generations


class TokenTable:
    """Columns [S] of the tokens in flight, indexed by slot.

    Attributes:
        row: of the sequence in the `SequenceTable`.
        position: in the sequence.
        iteration: major part of the progress key.
        leader: slot that names the token's group (see `Join`).
        in_chunk: the token belongs to a prefill chunk (of one token perhaps).
        wants_logits: the token goes through the experts of the last layer and the head.
        is_scored: ... not to sample after it, but for the log-probability of the prompt token behind it.
        drop_first: the user has marked it as the first to lose pairs.
    """

    def __init__(self, num_slots: int) -> None:
        self.row: Int32Array = np.zeros(num_slots, np.int32)
        self.position: Int32Array = np.zeros(num_slots, np.int32)
        self.iteration: Int32Array = np.zeros(num_slots, np.int32)
        self.leader: Int32Array = np.arange(num_slots, dtype=np.int32)
        self.in_chunk: BoolArray = np.zeros(num_slots, np.bool_)
        self.wants_logits: BoolArray = np.zeros(num_slots, np.bool_)
        self.is_scored: BoolArray = np.zeros(num_slots, np.bool_)
        self.drop_first: BoolArray = np.zeros(num_slots, np.bool_)

"""Which experts tokens took, for users who ask.

Shape letters: n tokens, L MoE layers (dense layers are left out), P pairs per token: the model's top-k, or all experts
where capacity may exceed it (`CapacityConfig.pairs_per_token`).

What is told is what is computed: after capacity, with rerouted pairs where they went and -1 for what nobody computes.
Prompt tokens without a wish for logits do not go through the experts of the last layer at all, and have -1 there.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import numpy.typing as npt

from amoe.core.sequence import Sequence, SequenceTable
from amoe.core.steps import AttentionStep, ForwardStep
from amoe.core.token_slots import TokenTable
from amoe.types import Int16Array, Int32Array


class RoutedExperts:
    """The experts of the tokens in flight at one home, by token slot, until they are through the last layer.

    Costs nothing while nobody asks. A token that is computed again after a preemption is told once.
    """

    def __init__(self, table: SequenceTable, num_slots: int, sparse_layers: SequenceOf[bool]) -> None:
        self._table = table
        self._num_slots = num_slots
        self._last_layer = len(sparse_layers) - 1
        self._index = np.cumsum(sparse_layers) - 1  # of a sparse layer among the sparse ones
        self._num_sparse = int(self._index[-1]) + 1
        self._experts: Int16Array | None = None  # [S, L, P]; P is known when the first step has run

    def record(
        self, layer: int, slots: Int32Array, rows: Int32Array, expert_ids: npt.NDArray[np.int64], num_pairs: int
    ) -> None:
        """Tokens in `slots` [n], of sequences `rows` [n], go to the experts `expert_ids` [n, <= P] of a layer.

        Args:
            num_pairs: P, the same at all times.
        """
        if self._table.num_telling == 0:
            return
        if self._experts is None:
            self._experts = np.full((self._num_slots, self._num_sparse, num_pairs), -1, np.int16)
        wanted = self._table.tells_experts[rows]
        if wanted.any():
            self._experts[slots[wanted], self._index[layer], : expert_ids.shape[1]] = expert_ids[wanted]

    def amend(self, layer: int, slots: Int32Array, tokens: TokenTable, expert_ids: npt.NDArray[np.int64]) -> None:
        """Tokens in `slots` [n], recorded before, go to the experts `expert_ids` [n, P] of the layer instead."""
        if self._table.num_telling == 0 or self._experts is None:
            return
        wanted = self._table.tells_experts[tokens.row[slots]]
        for slot, ids in zip(slots[wanted].tolist(), expert_ids[wanted], strict=True):
            if layer < self._last_layer:
                self._experts[slot, self._index[layer]] = ids
            elif (told := self._told(int(tokens.row[slot]), int(tokens.position[slot]))) is not None:
                told[-1] = ids

    def _told(self, row: int, position: int) -> Int16Array | None:
        """[L, P] what its sequence has been given of a token; None: it is out of the house already."""
        sequence = self._table.sequences[row]
        assert sequence is not None, f"row {row} holds no sequence"
        behind = sequence.num_routed - position  # its row, counted from the end
        for experts in reversed(sequence.routed):
            if behind <= len(experts):
                return experts[-behind]
            behind -= len(experts)
        return None

    def passed(self, step: AttentionStep | ForwardStep) -> None:
        """The tokens of a step have passed the last attention block, and those that go on to experts are recorded."""
        experts = self._experts
        if self._table.num_telling == 0 or experts is None:
            return
        for index in np.flatnonzero(self._table.tells_experts[step.rows[: step.num_decodes]]).tolist():
            self._tell(experts, step, index, index + 1)
        for span in step.chunks:
            if self._table.tells_experts[span.row]:
                self._tell(experts, step, span.start, span.end)

    def _tell(self, experts: Int16Array, step: AttentionStep | ForwardStep, start: int, end: int) -> None:
        """Rows [start, end) of a step are neighbours in one sequence: give it what it does not have yet."""
        sequence = self._table.sequences[int(step.rows[start])]
        assert sequence is not None, f"row {step.rows[start]} holds no sequence"
        first = int(step.positions[start])
        assert first <= sequence.num_routed, "tokens have been left out"
        slots = step.slots[start + sequence.num_routed - first : end]
        if len(slots):
            sequence.routed.append(experts[slots])
            sequence.num_routed += len(slots)
        experts[step.slots[start:end]] = -1


def take_routed(sequence: Sequence) -> bytes:
    """What a sequence has not been told yet: int16 [m, L, P], little endian, in C order."""
    if not sequence.routed:
        return b""
    arrays, sequence.routed = sequence.routed, []
    return np.concatenate(arrays).astype("<i2", copy=False).tobytes()

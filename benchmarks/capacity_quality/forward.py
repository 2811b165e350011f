"""Sequences of equal length through the real blocks of a model, in micro-batches that the caller chooses.

What the engine does between a router and its experts, in one process: the layer's router output goes to `decide`, whose
pairs are computed and summed. Shape letters as in `amoe.models.model`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from amoe.kernels.attention import AttentionBatch, ChunkSpan
from amoe.models.outputs import AttentionOutput
from amoe.models.worker_model import WorkerModel
from amoe.types import Float32Array, Int64Array

BLOCK_SIZE = 16


class Rows(NamedTuple):
    """The tokens of one micro-batch, in order.

    Attributes:
        sequences, positions: [n] whose token, and where in it.
        is_prefill: chunks of prompts; else one token each of different sequences.
        number: of the micro-batch, counted from the first.
    """

    sequences: Int64Array
    positions: Int64Array
    is_prefill: bool
    number: int


# (layer, tokens, what the attention block gave) to (expert ids [n, P], -1 where there is none; weights [n, P])
Decide = Callable[[int, Rows, AttentionOutput], tuple[Int64Array, Float32Array]]


class Forward:
    """A cache for `num_sequences` sequences of at most `length` tokens, and the passes that fill it."""

    def __init__(self, model: WorkerModel, num_sequences: int, length: int) -> None:
        self.model = model
        self._blocks = -(-length // BLOCK_SIZE)  # of a sequence
        self._tables = torch.arange(num_sequences * self._blocks).view(num_sequences, self._blocks)
        self._kv = model.new_kv_cache(num_sequences * self._blocks, BLOCK_SIZE)

    def step(self, tokens: torch.Tensor, rows: Rows, decide: Decide) -> torch.Tensor:
        """Logits [n, V] of one micro-batch; `tokens` [n] are the ids of its rows."""
        model, batch, positions = self.model, self._attention_batch(rows), torch.from_numpy(rows.positions)
        residual = model.embed(tokens)
        for layer in range(model.config.num_layers):
            out = model.attention(layer, residual, positions, self._kv, batch)
            residual = out.residual
            if out.moe_input is None:
                continue
            ids, weights = (torch.from_numpy(array) for array in decide(layer, rows, out))
            residual = model.experts(layer, out.moe_input, ids, weights, residual=residual)
        return model.head(residual)

    def _attention_batch(self, rows: Rows) -> AttentionBatch:
        slots = torch.from_numpy(rows.sequences * self._blocks * BLOCK_SIZE + rows.positions)
        if not rows.is_prefill:
            lens = torch.from_numpy(rows.positions + 1)
            tables = self._tables[torch.from_numpy(rows.sequences)]
            return AttentionBatch(slots, len(slots), tables, lens, int(lens.max()))
        starts = [0, *(np.flatnonzero(np.diff(rows.sequences)) + 1).tolist(), len(slots)]
        chunks = [
            ChunkSpan(start, end, self._tables[rows.sequences[start]], int(rows.positions[end - 1]) + 1)
            for start, end in itertools.pairwise(starts)
        ]
        none = torch.empty(0, dtype=torch.int64)
        return AttentionBatch(slots, 0, none.view(0, self._blocks), none, 0, chunks)

"""Runs the steps of the core on tensors: gathers tokens, calls the model's blocks, keeps what tokens leave behind.

Everything is addressed by token slot: S slots at each home, H hidden size, D expert workers, n tokens of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from amoe.core.batcher import Batcher
from amoe.core.sequence import SequenceTable
from amoe.core.steps import AttentionStep, ExpertsStep, ForwardStep, HeadStep, PromptTokens
from amoe.engine.sampler import SampledTokens, sample, score
from amoe.engine.sampling_table import SamplingTable
from amoe.engine.token_masks import MaskArray
from amoe.errors import CheckpointError
from amoe.kernels.attention import AttentionBatch, ChunkSpan
from amoe.models.checkpoint import checkpoint_digest
from amoe.models.loader import load_experts_for
from amoe.models.worker_model import PagedCache, WorkerModel
from amoe.types import Batch, BoolArray, Float32Array, Int32Array, Int64Array

IntArray = npt.NDArray[np.int32] | npt.NDArray[np.int64]


class Routed(NamedTuple):
    """What an MoE layer's router says of n tokens.

    Attributes:
        topk_ids, topk_weights: [n, K], on the host.
        moe_input: [n, H].
        scores: [n, E] softmax over all experts, on the host; None: nobody has asked for it.
    """

    topk_ids: npt.NDArray[np.int64]
    topk_weights: Float32Array
    moe_input: torch.Tensor
    scores: Float32Array | None = None


class HeadBlock(Protocol):
    """The head of one home."""

    def sample(
        self,
        step: HeadStep,
        sampling: SamplingTable,
        num_generated: Int64Array,
        grammar_masks: Callable[[], Mapping[int, MaskArray]] = dict,
    ) -> SampledTokens:
        """The next tokens [n] of tokens that have passed the last layer.

        Args:
            num_generated: [n] tokens that their sequences have generated so far.
            grammar_masks: [W] what the grammar of a row admits, of the rows that have one; may have to wait for it, so
                it is called as late as possible.
        """
        ...

    def score(self, prompt: PromptTokens, token_ids: Int64Array, num_top: int) -> SampledTokens:
        """Log-probabilities of the tokens `token_ids` [m] that follow the prompt tokens [m], and of the `num_top` best.

        The prompt tokens have passed the last layer.
        """
        ...


class AttentionBlocks(HeadBlock, Protocol):
    """Attention blocks and head of one home."""

    @property
    def moe_inputs(self) -> torch.Tensor:
        """[S, H] MoE input of the tokens that have been dispatched, by slot: kept until their answers are in."""
        ...

    def attention(self, step: AttentionStep) -> Routed | None:
        """Run attention(layer). None at a dense layer."""
        ...

    def keep(self, batch: Batch, owner: int, kept: BoolArray) -> None:
        """Keep rows `kept` [n] of a RESULT until the token's join is complete."""
        ...


class ExpertBlocks(Protocol):
    """Expert blocks of one worker."""

    def experts(self, step: ExpertsStep) -> torch.Tensor:
        """[n, H] weighted sum over the experts that live here, in the model's `sum_dtype`."""
        ...

    def keep(self, batch: Batch, slab_rows: Int32Array, kept: BoolArray) -> None:
        """Keep rows `kept` [n] of a DISPATCH. A local one has no payload: its home has written it already."""
        ...


def to_device(array: IntArray, device: torch.device) -> torch.Tensor:
    """int64 tensor of an index array."""
    return torch.from_numpy(array.astype(np.int64, copy=False)).to(device)


def _store(table: torch.Tensor, rows: Int32Array, batch: Batch, kept: BoolArray) -> None:
    """table[rows] = the batch's payload, where `kept`. Kernels of another kind may have made it, in another dtype."""
    payload = batch.payload
    assert payload is not None
    if not kept.all():
        chosen = np.flatnonzero(kept)
        payload, rows = payload[torch.from_numpy(chosen)], rows[chosen]
    table.index_copy_(0, to_device(rows, table.device), payload.to(table.device, table.dtype))


def attention_batch(
    table: SequenceTable, step: AttentionStep | ForwardStep, block_size: int, device: torch.device
) -> AttentionBatch:
    """Where the tokens of a step stand in the KV cache."""
    blocks = table.block_table[step.rows, step.positions // block_size].astype(np.int64)
    count = step.num_decodes
    lens = step.positions[:count] + 1
    longest = int(lens.max()) if count else 0
    decode_tables = table.block_table[step.rows[:count], : -(-longest // block_size)]
    chunks = []
    for span in step.chunks:
        context = int(step.positions[span.end - 1]) + 1
        block_table = to_device(table.block_table[span.row, : -(-context // block_size)], device)
        chunks.append(ChunkSpan(span.start, span.end, block_table, context))
    return AttentionBatch(
        slot_mapping=to_device(blocks * block_size + step.positions % block_size, device),
        num_decodes=count,
        decode_block_tables=to_device(decode_tables, device),
        decode_context_lens=to_device(lens, device),
        max_decode_context=longest,
        chunks=chunks,
        host_context_lens=lens.tolist(),
    )


class AttentionExecutor:
    """`AttentionBlocks` on tensors.

    Args:
        kv: its KV cache.
        num_owners: D.
        moe_inputs: [S, H] this home's part of the slab, if the worker holds experts too: local experts read a token's
            MoE input where attention has written it. None: it keeps them elsewhere, to send them again.
        with_scores: fetch the router's scores of all experts, for capacity.
    """

    def __init__(
        self,
        model: WorkerModel,
        kv: PagedCache,
        batcher: Batcher,
        num_owners: int,
        sparse_layers: Sequence[bool],
        moe_inputs: torch.Tensor | None,
        *,
        with_scores: bool = False,
    ) -> None:
        self._with_scores = with_scores
        self._model = model
        self._kv = kv
        self._batcher = batcher
        self._sparse = tuple(sparse_layers)
        shape = (batcher.slots.num_slots, model.config.hidden_size)
        if moe_inputs is None:
            moe_inputs = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.moe_inputs = moe_inputs
        self._residual = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self._partials = torch.zeros((num_owners, *shape), dtype=model.sum_dtype, device=model.device)

    def attention(self, step: AttentionStep) -> Routed | None:
        """See `AttentionBlocks`."""
        layer, device = step.block.layer, self._model.device
        slots = to_device(step.slots, device)
        residual = self._embed(step) if layer == 0 else self._combine(layer - 1, step.slots, slots)
        positions = to_device(step.positions, device)
        batch = attention_batch(self._batcher.table, step, self._kv.block_size, device)
        out = self._model.attention(layer, residual, positions, self._kv, batch)
        self._residual.index_copy_(0, slots, out.residual)
        if out.topk_ids is None or out.topk_weights is None or out.moe_input is None:
            return None
        self.moe_inputs.index_copy_(0, slots, out.moe_input)
        scores = out.scores.cpu().numpy() if self._with_scores and out.scores is not None else None
        return Routed(out.topk_ids.cpu().numpy(), out.topk_weights.cpu().numpy(), out.moe_input, scores)

    def head(self, slots: Int32Array) -> torch.Tensor:
        """Logits [n, V] float32 of the tokens in `slots` [n], which have passed the last layer."""
        return self._model.head(self._combine(len(self._sparse) - 1, slots, to_device(slots, self._model.device)))

    def sample(
        self,
        step: HeadStep,
        sampling: SamplingTable,
        num_generated: Int64Array,
        grammar_masks: Callable[[], Mapping[int, MaskArray]] = dict,
    ) -> SampledTokens:
        """See `AttentionBlocks`."""
        table, rows = self._batcher.table, step.rows.astype(np.int64)
        logits = self.head(step.slots)
        histories = (table.tokens, table.prompt_len, table.num_tokens)
        return sample(logits, sampling, rows, num_generated, *histories, grammar_masks(), self._model.argmax)

    def score(self, prompt: PromptTokens, token_ids: Int64Array, num_top: int) -> SampledTokens:
        """See `AttentionBlocks`."""
        vocab_size = self._model.config.vocab_size
        return score(lambda where: self.head(prompt.slots[where]), token_ids, num_top, vocab_size)

    def keep(self, batch: Batch, owner: int, kept: BoolArray) -> None:
        """See `AttentionBlocks`."""
        _store(self._partials[owner], batch.slots, batch, kept)

    def _embed(self, step: AttentionStep) -> torch.Tensor:
        token_ids = self._batcher.table.tokens[step.rows, step.positions]
        return self._model.embed(to_device(token_ids, self._model.device))

    def _combine(self, layer: int, host_slots: Int32Array, slots: torch.Tensor) -> torch.Tensor:
        """Residuals [n, H] behind `layer`: partial sums are added in the order of owners, in float32."""
        residual = self._residual.index_select(0, slots)
        if not self._sparse[layer]:
            return residual
        dispatched = self._batcher.join.dispatched[host_slots]
        total: torch.Tensor | None = None
        for owner in np.flatnonzero(dispatched.any(axis=0)).tolist():  # there may be many more than answer now
            partials, column = self._partials[owner], dispatched[:, owner]
            if column.all():
                part = partials.index_select(0, slots).float()
                total = part if total is None else total + part
            else:
                if total is None:
                    total = torch.zeros(residual.shape, dtype=torch.float32, device=residual.device)
                chosen = to_device(np.flatnonzero(column), residual.device)
                total.index_add_(0, chosen, partials.index_select(0, slots.index_select(0, chosen)).float())
        if total is None:
            return residual
        return total.add_(residual).to(residual.dtype)


class ExpertsExecutor:
    """`ExpertBlocks` on tensors, over the slab [num_homes * S, H] of MoE inputs that have been dispatched to it; and an
    `ExpertStore`.

    Args:
        path: of the checkpoint that the experts come from.
    """

    def __init__(self, model: WorkerModel, num_homes: int, slots_per_home: int, path: str) -> None:
        self._model = model
        self._path = path
        self._digest = checkpoint_digest(path)
        self.slab = torch.zeros(
            (num_homes * slots_per_home, model.config.hidden_size), dtype=model.dtype, device=model.device
        )

    @property
    def parameter_bytes(self) -> int:
        """See `ExpertStore`."""
        return self._model.parameter_bytes

    def held(self) -> dict[int, tuple[int, ...]]:
        """See `ExpertStore`."""
        return self._model.held_experts

    def prepare(self, layer: int, ids: tuple[int, ...]) -> Any:
        """See `ExpertStore`."""
        if checkpoint_digest(self._path) != self._digest:
            raise CheckpointError(f"{self._path} has changed since this worker has read it: restart the server")
        return load_experts_for(self._model, self._path, layer, ids)

    def install(self, layer: int, prepared: Any) -> None:
        """See `ExpertStore`."""
        self._model.set_experts(layer, prepared)

    def discard(self, layer: int) -> None:
        """See `ExpertStore`."""
        self._model.discard_experts(layer)

    def keep(self, batch: Batch, slab_rows: Int32Array, kept: BoolArray) -> None:
        """See `ExpertBlocks`."""
        _store(self.slab, slab_rows, batch, kept)

    def experts(self, step: ExpertsStep) -> torch.Tensor:
        """See `ExpertBlocks`."""
        layer = step.block.layer
        ids, weights = torch.from_numpy(step.expert_ids), torch.from_numpy(step.expert_weights)
        return self._model.experts(layer, self.slab, ids, weights, rows=to_device(step.slab_rows, self._model.device))

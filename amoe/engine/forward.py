"""All layers of a model in one step, at a worker that holds it whole: every call on the model in that schedule is here.

Residuals live as long as the step. Shape letters: n tokens, w of them that the head wants to see, H hidden size, L
layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from amoe.clock import Clock
from amoe.core.batcher import Batcher
from amoe.core.steps import ForwardStep, HeadStep, PromptTokens
from amoe.engine.executor import attention_batch, to_device
from amoe.engine.messages import HoldExperts, Holding
from amoe.engine.sampler import SampledTokens, sample, score
from amoe.engine.sampling_table import SamplingTable
from amoe.engine.token_masks import MaskArray
from amoe.models.outputs import Passed
from amoe.models.worker_model import PagedCache, WorkerModel
from amoe.types import Int64Array


class ForwardExecutor:
    """Runs forward steps, and the head on what has passed in the last one.

    Args:
        model: all of it.
        kv: its KV cache.
    """

    def __init__(self, model: WorkerModel, kv: PagedCache, batcher: Batcher, clock: Clock) -> None:
        self._model = model
        self._kv = kv
        self._table = batcher.table
        self._clock = clock
        self._num_heads = 0
        self._step: ForwardStep | None = None
        self._residual: torch.Tensor | None = None

    @property
    def num_layers(self) -> int:
        return self._model.config.num_layers

    @property
    def progress(self) -> int:
        """Goes up with every layer of a step, and every call of the head. Any thread may ask, also inside a step."""
        return self._model.progress + self._num_heads

    def forward(self, step: ForwardStep) -> Passed:
        """Take the tokens of a step through all layers. What is the same in all of them is looked up once."""
        model, device = self._model, self._model.device
        batch = attention_batch(self._table, step, self._kv.block_size, device)
        positions = to_device(step.positions, device)
        residual = model.embed(to_device(self._table.tokens[step.rows, step.positions], device))
        wanted = None if step.wanted is None else to_device(step.wanted, device)
        passed = model.forward(residual, positions, self._kv, batch, wanted, self._clock.now)
        self._step, self._residual = step, passed.residual
        return passed

    def hold(self, order: HoldExperts) -> Holding:
        """The answer to whoever says which experts to hold: all of them are here, and none can go."""
        config, every = self._model.config, list(range(self._model.config.num_experts))
        is_whole = order.experts == [every if is_sparse else [] for is_sparse in config.sparse_layers]
        complaint = "" if is_whole else "a worker that takes tokens through the whole model holds all experts"
        return Holding(order.order, self._model.parameter_bytes, complaint)

    def sample(
        self,
        step: HeadStep,
        sampling: SamplingTable,
        num_generated: Int64Array,
        grammar_masks: Callable[[], Mapping[int, MaskArray]] = dict,
    ) -> SampledTokens:
        """See `HeadBlock`; `step` is the head's part of the last forward step."""
        assert self._step is not None and self._step.head is step
        table, rows = self._table, step.rows.astype(np.int64)
        logits = self._logits(self._step.head_rows)
        histories = (table.tokens, table.prompt_len, table.num_tokens)
        return sample(logits, sampling, rows, num_generated, *histories, grammar_masks(), self._model.argmax)

    def score(self, prompt: PromptTokens, token_ids: Int64Array, num_top: int) -> SampledTokens:
        """See `HeadBlock`; `prompt` is a part of the last forward step."""
        assert self._step is not None and self._step.prompt_rows is not None
        rows, vocab_size = self._step.prompt_rows, self._model.config.vocab_size
        return score(lambda where: self._logits(rows[where]), token_ids, num_top, vocab_size)

    def _logits(self, rows: Int64Array | None) -> torch.Tensor:
        """[m, V] float32 of rows [m] of the w; None: of all."""
        assert self._residual is not None
        residual = self._residual
        if rows is not None and len(rows) < len(residual):
            residual = residual.index_select(0, to_device(rows, residual.device))
        logits = self._model.head(residual)
        self._num_heads += 1
        return logits

"""The home of a worker that holds the whole model: an iteration is one step through all layers.

Nobody else has a part of these tokens, so there is no queue to wait in, no answer to join, and no other step that they
could overlap with. What starts an iteration together goes through the model together, decode tokens and prefill chunks,
and is through when the step is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from amoe.core.batcher import Batcher, Entry
from amoe.core.routed_experts import RoutedExperts
from amoe.core.steps import ChunkSpan, ForwardStep, HeadStep, PromptTokens
from amoe.policy.prompt_budget import learn_token_s, prompt_budget
from amoe.types import BlockId, BlockKind, BoolArray


class ForwardCore:
    """Says what goes through the model next, and takes what has come of it. Knows no tensor and no clock.

    Args:
        sparse_layers: [L] the layer has experts.
    """

    def __init__(self, batcher: Batcher, sparse_layers: Sequence[bool]) -> None:
        self.batcher = batcher
        self._num_layers = len(sparse_layers)
        self._max_prefill_tokens = batcher.max_prefill_tokens
        self._token_s: float | None = None  # see `amoe.policy.prompt_budget`
        self._head = BlockId(BlockKind.HEAD, self._num_layers)
        self._routed = RoutedExperts(batcher.table, batcher.slots.num_slots, sparse_layers)

    def next_step(self, now: float) -> ForwardStep | None:
        """The next iteration of every sequence that can have one; None if none can.

        The step has to run, and be told to `on_forward` and, if it has one, to `on_head`, before anything else happens
        here.
        """
        num_ready, num_decodes = self.batcher.num_ready, self.batcher.num_decodes_ready
        if num_ready == 0:
            return None
        budget = prompt_budget(self._max_prefill_tokens, num_decodes, num_ready - num_decodes, self._token_s)
        self.batcher.max_prefill_tokens = budget
        entry = self.batcher.start(now)
        return self._step(entry) if entry.num_tokens else None

    def _step(self, entry: Entry) -> ForwardStep:
        tokens, num_decodes = self.batcher.tokens, len(entry.decodes)
        if not entry.chunks:
            slots = entry.decodes
            rows = tokens.row[slots]
            head = HeadStep(self._head, slots, rows)
            return ForwardStep(slots, rows, tokens.position[slots], num_decodes, head=head)
        slots = np.concatenate((entry.decodes, *entry.chunks))
        ends = num_decodes + np.cumsum([len(chunk) for chunk in entry.chunks])
        rows = tokens.row[slots]
        chunks = [
            ChunkSpan(end - len(chunk), end, int(rows[end - 1]))
            for chunk, end in zip(entry.chunks, ends.tolist(), strict=True)
        ]
        step = ForwardStep(slots, rows, tokens.position[slots], num_decodes, chunks)
        self._add_head(step)
        return step

    def _add_head(self, step: ForwardStep) -> None:
        """Tell the tokens that the head wants to see: those to sample after, and those of scored prompts."""
        tokens = self.batcher.tokens
        step.wanted = wanted = np.flatnonzero(tokens.wants_logits[step.slots])
        if len(wanted) == 0:
            return
        scored = tokens.is_scored[step.slots[wanted]]
        step.head_rows = np.flatnonzero(~scored)
        chosen = wanted[step.head_rows]
        step.head = HeadStep(self._head, step.slots[chosen], step.rows[chosen])
        if scored.any():
            step.prompt_rows = np.flatnonzero(scored)
            chosen = wanted[step.prompt_rows]
            step.head.prompt = PromptTokens(step.slots[chosen], step.rows[chosen], step.positions[chosen])

    def on_forward(self, step: ForwardStep, expert_ids: Mapping[int, npt.NDArray[np.int64]]) -> None:
        """`step` has run through all layers; the head comes next, where there is one.

        Args:
            expert_ids: by layer, of those that have experts, [n, K]; of the last layer [w, K].
        """
        if self.batcher.table.num_telling:
            self._record(step, expert_ids)
        for leader in [int(step.slots[span.end - 1]) for span in step.chunks]:
            self.batcher.finish_chunk(leader)

    def _record(self, step: ForwardStep, expert_ids: Mapping[int, npt.NDArray[np.int64]]) -> None:
        """Keep which experts the tokens took, for users who ask."""
        for layer, ids in expert_ids.items():
            goes_on = step.wanted if layer == self._num_layers - 1 else None
            slots, rows = (step.slots, step.rows) if goes_on is None else (step.slots[goes_on], step.rows[goes_on])
            self._routed.record(layer, slots, rows, ids, ids.shape[1])
        self._routed.passed(step)

    def observe(self, step: ForwardStep, seconds: float) -> None:
        """`step` has taken so long, with its head."""
        num_prompt_tokens = step.num_tokens - step.num_decodes
        self._token_s = learn_token_s(self._token_s, self._max_prefill_tokens, num_prompt_tokens, seconds)

    def on_head(self, step: HeadStep, token_ids: npt.NDArray[np.int64], finished: BoolArray) -> None:
        """The head has sampled `token_ids` [n], and seen the step's prompts; the sequences `finished` [n] end."""
        if step.prompt is not None:
            self.batcher.finish_scoring(step.prompt.slots)
        self.batcher.extend(step.slots, token_ids, finished)

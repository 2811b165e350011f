"""What a core asks its shell to run, and what the shell is to send: arrays only, no payload."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from amoe.types import Batch, BlockId, BoolArray, Float32Array, Int16Array, Int32Array, Int64Array


@dataclass(slots=True)
class ChunkSpan:
    """Rows [start, end) of a step are a prefill chunk of the sequence in `row` of the sequence table."""

    start: int
    end: int
    row: int


@dataclass(slots=True)
class AttentionStep:
    """Run attention(layer) on n tokens; before it, add up what the join of the layer before has brought.

    Attributes:
        slots, rows, positions: [n] of the tokens; the first `num_decodes` are single tokens, chunks follow.
        chunks: the spans of the rest.
    """

    block: BlockId
    slots: Int32Array
    rows: Int32Array
    positions: Int32Array
    num_decodes: int
    chunks: list[ChunkSpan] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.slots)


@dataclass(slots=True)
class PromptTokens:
    """Tokens [m] of prompts whose successors' log-probabilities are wanted; those of a sequence are neighbours."""

    slots: Int32Array
    rows: Int32Array
    positions: Int32Array


@dataclass(slots=True)
class HeadStep:
    """Run the head on n tokens, one per sequence, and sample; and on `prompt`, where nothing is sampled."""

    block: BlockId
    slots: Int32Array
    rows: Int32Array
    prompt: PromptTokens | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.slots) + (0 if self.prompt is None else len(self.prompt.slots))


@dataclass(slots=True)
class ExpertsStep:
    """Run the experts of a layer on n tokens, which come from several homes and are sorted by home.

    Attributes:
        slab_rows: [n] where each token's MoE input lies: index of home · slots per home + slot.
        expert_ids, expert_weights: [n, K] pairs at this worker; id -1 where there is none.
        replies: one per home, with the rows [start, end) of the step that it gets back.
    """

    block: BlockId
    slab_rows: Int32Array
    expert_ids: Int16Array
    expert_weights: Float32Array
    replies: list[Outgoing]

    @property
    def num_tokens(self) -> int:
        return len(self.slab_rows)

    def only(self, kept: BoolArray) -> ExpertsStep:
        """The step with the tokens `kept` [n] alone: the others are not answered."""
        rank = np.concatenate(([0], np.cumsum(kept)))  # of each row among the kept ones
        replies = []
        for reply in self.replies:
            assert isinstance(reply.rows, slice), "an expert worker's answers are rows of its step"
            start, end = reply.rows.start, reply.rows.stop
            here = kept[start:end]
            if not here.any():
                continue
            batch = replace(
                reply.batch,
                count=int(here.sum()),
                slots=reply.batch.slots[here],
                generations=reply.batch.generations[here],
            )
            replies.append(Outgoing(batch, slice(int(rank[start]), int(rank[end]))))
        return ExpertsStep(self.block, self.slab_rows[kept], self.expert_ids[kept], self.expert_weights[kept], replies)


@dataclass(slots=True)
class Outgoing:
    """A batch to send; the shell sets its payload to rows `rows` of the step's output (None: no payload)."""

    batch: Batch
    rows: Int32Array | slice | None = None


@dataclass(slots=True)
class ForwardStep:
    """Take n tokens through all layers, and some of them through the head: an iteration of the schedule `forward`.

    Attributes:
        slots, rows, positions: [n] of the tokens; the first `num_decodes` are single tokens, chunks follow.
        chunks: the spans of the rest.
        wanted: [w] rows of the step, ascending, whose tokens go through the experts of the last layer and the head;
            None: all of them.
        head: what the head does with those, `head.slots` and `head.prompt.slots` together; None: there are none.
        head_rows, prompt_rows: where these two stand among the w.
    """

    slots: Int32Array
    rows: Int32Array
    positions: Int32Array
    num_decodes: int
    chunks: list[ChunkSpan] = field(default_factory=list)
    wanted: Int64Array | None = None
    head: HeadStep | None = None
    head_rows: Int64Array | None = None
    prompt_rows: Int64Array | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.slots)

    @property
    def num_wanted(self) -> int:
        """w."""
        return len(self.slots) if self.wanted is None else len(self.wanted)


BlockStep = AttentionStep | HeadStep | ExpertsStep
Step = BlockStep | ForwardStep

NO_SLOTS: Int32Array = np.empty(0, np.int32)

"""The attention side of a worker: homes of sequences, dispatch of their tokens, and the join of what comes back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from amoe.config import FailureConfig
from amoe.core.batcher import Batcher, Entry
from amoe.core.capacity import HomeCapacity
from amoe.core.dispatcher import Dispatcher, Pairs
from amoe.core.home_waves import HomeWaves
from amoe.core.lockstep import HomeBarrier
from amoe.core.micro_queue import MicroQueues
from amoe.core.owner_pace import OwnerPace
from amoe.core.recovery import Recovery
from amoe.core.replica_shares import ReplicaShares
from amoe.core.routed_experts import RoutedExperts
from amoe.core.steps import NO_SLOTS, AttentionStep, ChunkSpan, HeadStep, Outgoing, PromptTokens
from amoe.stats import JOIN_WAIT_EDGES, LayerHistograms
from amoe.types import Batch, BlockId, BlockKind, BoolArray, Float32Array, Int16Array, Int32Array


class AttentionCore:
    """Moves the tokens of one home worker from block to block. Knows no tensor and no clock.

    Args:
        rank: of this worker.
        owner_ranks: [D] ranks of the expert workers; an *owner* is an index into it.
        replicas: who computes which pair.
        sparse_layers: [L] the layer has experts; a dense layer's MLP runs in its attention block.
        barrier: lockstep only.
        waves: schedule `waves` only.
        capacity: what may be dropped or rerouted; None: nothing.
        pace: relieves expert workers that are late; None: the shares of the replicas say all.
        failure: when an answer is late, and whether tokens wait for experts that nobody holds.

    Attributes:
        stepping: lane of the step that runs now; -1: none.
        recovery: what is done about answers that do not come.
    """

    def __init__(
        self,
        *,
        rank: int,
        owner_ranks: Sequence[int],
        replicas: ReplicaShares,
        sparse_layers: Sequence[bool],
        batcher: Batcher,
        queues: MicroQueues,
        barrier: HomeBarrier | None = None,
        waves: HomeWaves | None = None,
        capacity: HomeCapacity | None = None,
        pace: OwnerPace | None = None,
        failure: FailureConfig = FailureConfig(),  # noqa: B008 - frozen
    ) -> None:
        self.rank = rank
        self.batcher = batcher
        self.join_waits = LayerHistograms(len(sparse_layers), JOIN_WAIT_EDGES)
        self._owner_of_rank = {owner_rank: owner for owner, owner_rank in enumerate(owner_ranks)}
        self.capacity = capacity
        self._pace = pace
        self._replicas = replicas
        self._routed = RoutedExperts(batcher.table, batcher.slots.num_slots, sparse_layers)
        self._sparse = tuple(sparse_layers)
        self._num_layers = len(sparse_layers)
        self._queues = queues
        self._barrier = barrier
        self._waves = waves
        self.stepping = -1
        self._dispatcher = Dispatcher(rank, owner_ranks, batcher, replicas.present)
        self.recovery = Recovery(
            self._dispatcher,
            batcher,
            replicas,
            timeout_s=failure.timeout_s,
            come_home=self._come_home,
            routed=self._routed,
            waves=waves,
            capacity=capacity,
            pace=pace,
            degrades=failure.on_expert_loss == "reroute",
            may_resend=barrier is None,
        )

    # ---- tokens enter

    def start(self, now: float) -> list[Outgoing]:
        """Start the iterations that can start now. Returns what there is to announce (waves and lockstep only)."""
        if self._waves is not None:
            return self._waves.start(self, now)
        if self._barrier is not None:
            return self._barrier.start(self, now)
        if self.batcher.num_ready:
            self.enter(self.batcher.start(now), 0, now)
        return []

    def enter(self, entry: Entry, wave: int, now: float, iteration: int | None = None) -> None:
        """Tokens join the μ-queue of attention(0); `iteration`: as which they count, if not as their own."""
        for slots in (entry.decodes, *entry.chunks):
            self.batcher.join.lane[slots] = wave
            if iteration is not None:
                self.batcher.tokens.iteration[slots] = iteration
            self._push(BlockId(BlockKind.ATTENTION, 0, wave), slots, now)

    def _push(self, block: BlockId, slots: Int32Array, now: float) -> None:
        columns = (slots, self.batcher.slots.generation[slots])
        self._queues.push(block, columns, self.batcher.tokens.iteration[slots], now)

    def set_shares(self, shares: npt.NDArray[np.floating]) -> None:
        """Tokens that are dispatched from now on choose replicas by other shares [num_layers, num_experts, R].

        Raises:
            ValueError: they do not belong to the replicas that there are.
        """
        self._replicas.set(shares)

    @property
    def replica_shape(self) -> tuple[int, ...]:
        """[num_layers, num_experts, R] of the replicas as they are placed."""
        return self._replicas.shape

    def _drain(self, index: int) -> Int32Array:
        """Slots [n] that wait for a block, without those whose token is gone."""
        columns = self._queues.drain(index)
        if columns is None:
            return NO_SLOTS
        slots, generations = columns
        current = self.batcher.slots.is_current(slots, generations)
        return slots if current.all() else slots[current]

    # ---- steps

    def attention_step(self, index: int) -> AttentionStep:
        """Take all tokens that wait for an attention block: decode tokens first, then chunk by chunk."""
        tokens = self.batcher.tokens
        block = self._begin(index)
        slots = self._drain(index)
        in_chunk = tokens.in_chunk[slots]
        num_decodes = len(slots) - int(in_chunk.sum())
        chunks = []
        if num_decodes < len(slots):
            chunked = slots[in_chunk]  # a chunk joins a queue as a whole, so its tokens are neighbours
            slots = np.concatenate((slots[~in_chunk], chunked))
            leaders = tokens.leader[chunked]
            starts = np.flatnonzero(np.diff(leaders, prepend=-1)).tolist()
            for start, end in zip(starts, [*starts[1:], len(chunked)], strict=True):
                row = int(tokens.row[chunked[start]])
                chunks.append(ChunkSpan(num_decodes + start, num_decodes + end, row))
        return AttentionStep(block, slots, tokens.row[slots], tokens.position[slots], num_decodes, chunks)

    def head_step(self, index: int) -> HeadStep:
        """Take all tokens that wait for the head."""
        block = self._begin(index)
        slots = self._drain(index)
        tokens = self.batcher.tokens
        scored = tokens.is_scored[slots]
        if not scored.any():
            return HeadStep(block, slots, tokens.row[slots])
        slots, prompt = slots[~scored], slots[scored]  # a chunk joins a queue as a whole
        positions = tokens.position[prompt]
        return HeadStep(block, slots, tokens.row[slots], PromptTokens(prompt, tokens.row[prompt], positions))

    def _begin(self, index: int) -> BlockId:
        block = self._queues.block(index)
        self.stepping = block.wave
        if self._waves is not None:
            self._waves.on_run(block.wave, self)
        return block

    def on_attention(
        self,
        step: AttentionStep,
        topk_ids: npt.NDArray[np.int64] | None,
        topk_weights: Float32Array | None,
        now: float,
        scores: Float32Array | None = None,
    ) -> list[Outgoing]:
        """attention(l) has run on `step`; the router says `topk_ids`, `topk_weights` [n, K] (None at a dense layer).

        Args:
            scores: [n, E] softmax over all experts, which capacity needs; None: nothing is dropped or rerouted.

        Returns:
            One dispatch per expert worker that has something to do, with the rows of the step that it gets.
        """
        layer, wave = step.block.layer, step.block.wave
        slots = step.slots
        self.stepping = -1
        rows = np.arange(len(slots))
        is_last = layer == self._num_layers - 1
        if is_last and step.chunks:
            # Only tokens that the head wants to see need the experts of the last layer.
            wanted = self.batcher.tokens.wants_logits[slots]
            for leader in self.batcher.tokens.leader[slots[[span.start for span in step.chunks]]].tolist():
                self.batcher.finish_chunk(leader)
            slots, rows = slots[wanted], rows[wanted]
        outgoing: list[Outgoing] = []
        if not self._sparse[layer] or topk_ids is None or topk_weights is None:
            self._advance(layer, wave, slots, now, dense=True)
        else:
            top_k = topk_ids.shape[1]
            topk_ids, topk_weights = topk_ids[rows], topk_weights[rows]
            pairs = Pairs(topk_ids, topk_weights, self._choose_replicas(layer, topk_ids, now))
            if self.capacity is not None and scores is not None and len(rows):
                pairs = self.capacity.decide(layer, slots, rows >= step.num_decodes, pairs, scores[rows], now)
            if step.num_tokens:
                num_pairs = top_k if self.capacity is None else self.capacity.pairs_per_token(top_k)
                self._routed.record(layer, slots, step.rows[rows], pairs.expert_ids, num_pairs)
            self.recovery.keep(slots, pairs, None if scores is None else scores[rows])
            outgoing = self._dispatch(step.block, slots, rows, pairs, now)
        if is_last:
            self._routed.passed(step)
        return outgoing

    def _choose_replicas(self, layer: int, topk_ids: npt.NDArray[np.int64], now: float) -> Int16Array:
        if self._pace is None:
            return self._replicas.choose(layer, topk_ids)
        return self._pace.choose(layer, topk_ids, now)

    def _dispatch(
        self, block: BlockId, slots: Int32Array, rows: npt.NDArray[np.int64], pairs: Pairs, now: float
    ) -> list[Outgoing]:
        has_missing = bool(self._replicas.has_missing[block.layer])
        dispatched = self._dispatcher.destinations(pairs.owners, may_be_nobody=has_missing)
        if self.capacity is not None:
            self.capacity.sent(slots, dispatched)
        if self._pace is not None:
            self._pace.sent(slots, pairs.expert_ids, pairs.owners, dispatched, now)
        leaders = self.batcher.tokens.leader[slots]
        if self._waves is not None:
            self._waves.leaving(slots, leaders, dispatched)
        self.batcher.join.open(slots, leaders, block.layer, dispatched, now)
        epoch = self._epoch_of_dispatch(block, now)
        outgoing = self._dispatcher.batches(block, epoch, slots, rows, pairs, dispatched)
        if self.capacity is not None:
            self._pass_over(block, leaders, dispatched, now)
        return outgoing

    def _pass_over(self, block: BlockId, leaders: Int32Array, dispatched: BoolArray, now: float) -> None:
        """Groups of which no token has any expert left wait for nobody: they go on with their residuals."""
        is_empty = ~dispatched.any(axis=1)
        if is_empty.any() and len(idle := self.batcher.join.idle(leaders[is_empty])):
            self._advance(block.layer, block.wave, idle, now)

    def _epoch_of_dispatch(self, block: BlockId, now: float) -> int | None:
        """For the headers; None: nobody waits for these tokens, so nobody needs to hear that there are none for him."""
        if self._waves is not None:
            return self._waves.dispatched(block, now)
        return self._barrier.dispatched(block.wave) if self._barrier is not None else None

    def on_result(self, batch: Batch, now: float) -> BoolArray:
        """Answers have come from an expert worker.

        Returns:
            [n]: the row is awaited, and its payload has to be kept. Late ones and duplicates are False.
        """
        join, slots = self.batcher.join, batch.slots
        owner = self._owner_of_rank[batch.src]
        if self.capacity is not None:
            self.capacity.heard(owner, batch, now)
        current = self.batcher.slots.is_current(slots, batch.generations)
        accepted = join.accept(slots, current, batch.layer, owner)
        if self._pace is not None:
            self._pace.heard(owner, slots, accepted, now)
        self.recovery.heard(owner, now)
        slots = slots if accepted.all() else slots[accepted]
        leaders = join.settle(slots, self.batcher.tokens.leader[slots], owner)
        if self._barrier is not None:
            self._barrier.on_result(batch)
        if self._waves is not None:
            self._waves.on_result(owner)
        self.batcher.see_iteration(batch.latest_iteration)
        if len(leaders):
            self.join_waits.observe_many(batch.layer, join.waits(leaders, now))
            self._come_home(batch.layer, leaders, now)
        return accepted

    def _come_home(self, layer: int, leaders: Int32Array, now: float) -> None:
        """Complete groups [n] go on, each through its own lane: it may have become loose while it was away."""
        lanes = self.batcher.join.lane[leaders]
        if (lanes == lanes[0]).all():
            self._advance(layer, int(lanes[0]), leaders, now)
            return
        for lane in np.unique(lanes).tolist():
            self._advance(layer, lane, leaders[lanes == lane], now)

    def _advance(self, layer: int, wave: int, slots: Int32Array, now: float, *, dense: bool = False) -> None:
        """Tokens go on to the block behind `layer`: leaders of complete groups, or (`dense`) all tokens of a step."""
        if dense and self._barrier is not None:
            self._barrier.passed(wave)
        is_last = layer == self._num_layers - 1
        block = BlockId(BlockKind.HEAD if is_last else BlockKind.ATTENTION, layer + 1, wave)
        in_chunk = self.batcher.tokens.in_chunk[slots]
        if dense or not in_chunk.any():
            self._push(block, slots, now)
            return
        self._push(block, slots[~in_chunk], now)
        for leader in slots[in_chunk].tolist():
            self._push(block, self.batcher.members[leader], now)

    def on_head(self, step: HeadStep, token_ids: npt.NDArray[np.int64], finished: BoolArray) -> None:
        """The head has sampled `token_ids` [n], and seen the step's prompts; the sequences `finished` [n] end."""
        self.stepping = -1
        if self._barrier is not None:
            self._barrier.finish(step.block.wave)
        if step.prompt is not None:
            self.batcher.finish_scoring(step.prompt.slots)
        self.batcher.extend(step.slots, token_ids, finished)

"""What a worker's loop counts, and the snapshot that its heartbeat carries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from amoe.core.attention import AttentionCore
from amoe.core.batcher import Batcher
from amoe.core.experts import count_pairs, count_pairs_by_layer
from amoe.core.steps import AttentionStep, BlockStep, ExpertsStep, ForwardStep
from amoe.core.worker import WorkerCore
from amoe.engine.traffic import TrafficCounts
from amoe.policy.decision import Reason
from amoe.policy.steering import count_work
from amoe.stats import BATCH_SIZE_EDGES, ITERATION_EDGES, LayerHistograms, QueueSnapshot, WorkerStats
from amoe.types import Batch, BatchKind, BlockKind

_NAMES = {BlockKind.ATTENTION: "attention", BlockKind.EXPERTS: "experts", BlockKind.HEAD: "head"}


class StatsKeeper:
    """Cumulative counters of one worker.

    Args:
        modelled_s: seconds that the kernels of an emulated device were to take so far.
        ridge_tokens: tokens of an expert below which reading its weights takes longer than computing.
    """

    def __init__(
        self,
        rank: int,
        role: str,
        num_layers: int,
        num_experts: int,
        modelled_s: Callable[[], float] = lambda: 0.0,
        ridge_tokens: int = 1,
    ) -> None:
        self.rank = rank
        self.role = role
        self.loops = 0
        self.steps = 0
        self.expert_work = 0
        self.expert_wait_s = 0.0
        self._unseen_s = 0.0  # what has come since may have waited so long before it was seen
        self._busy_s = dict.fromkeys(BlockKind, 0.0)
        self._wait_s = dict.fromkeys((Reason.IDLE, Reason.AWAY, Reason.HELD), 0.0)
        self._waited_s = np.zeros(1)  # by μ-queue, as soon as one has been seen
        self._ran_s = {kind: np.zeros(num_layers + 1) for kind in BlockKind}
        self._iterations = LayerHistograms(1, ITERATION_EDGES)
        self._traffic = TrafficCounts(rank)
        self._ridge_tokens = ridge_tokens
        self._batch_sizes = {kind: LayerHistograms(num_layers + 1, BATCH_SIZE_EDGES) for kind in BlockKind}
        self._modelled_s = modelled_s
        self._expert_pairs = np.zeros((num_layers, num_experts), np.int64)

    def observe(self, step: BlockStep, seconds: float) -> None:
        """A step has run."""
        self.steps += 1
        self._unseen_s = seconds
        self._ran_s[step.block.kind][step.block.layer] += step.num_tokens * seconds
        self._busy_s[step.block.kind] += seconds
        self._batch_sizes[step.block.kind].observe(step.block.layer, step.num_tokens)
        if isinstance(step, AttentionStep) and step.block.layer == 0 and step.num_tokens:
            self._iterations.observe(0, step.num_tokens)
        if isinstance(step, ExpertsStep) and step.num_tokens:
            counts = count_pairs(step.expert_ids, self._expert_pairs.shape[1])
            self._expert_pairs[step.block.layer] += counts
            self.expert_work += count_work(counts, self._ridge_tokens)
            self.expert_wait_s += (step.num_tokens - 1) * seconds

    def observe_forward(
        self,
        step: ForwardStep,
        expert_ids: Mapping[int, npt.NDArray[np.int64]],
        seconds: npt.NDArray[np.float64],
        total_s: float,
    ) -> None:
        """All blocks have run as one step: each of them counts as if it had run alone.

        Args:
            expert_ids: by layer, of those that have experts, [n, K].
            seconds: [L, 2] that attention and experts have taken.
            total_s: that the step has taken: what is left over is the head's, or, where there was none, attention(0)'s.
        """
        self.steps += 1
        rest = total_s - float(seconds.sum())
        attention_s = seconds[:, 0].copy()
        if step.num_wanted == 0:
            attention_s[0] += rest
        num_layers, num_last = len(self._expert_pairs), step.num_wanted
        tokens = np.full(num_layers, step.num_tokens)
        self._iterations.observe(0, step.num_tokens)
        self._count_blocks(BlockKind.ATTENTION, np.arange(num_layers), tokens, attention_s)
        tokens[-1] = num_last
        sparse = np.fromiter(expert_ids, np.int64, len(expert_ids))
        # The MLP of a dense layer is a part of its attention block: what the clock says of its experts is nothing.
        ran = sparse[tokens[sparse] > 0]
        self._count_blocks(BlockKind.EXPERTS, ran, tokens[ran], seconds[ran, 1])
        if num_last:
            self._count_blocks(BlockKind.HEAD, np.array([num_layers]), np.array([num_last]), np.array([rest]))
        counts = count_pairs_by_layer(list(expert_ids.values()), self._expert_pairs.shape[1])
        self._expert_pairs[sparse] += counts
        self.expert_work += count_work(counts, self._ridge_tokens)

    def _count_blocks(
        self,
        kind: BlockKind,
        layers: npt.NDArray[np.int64],
        tokens: npt.NDArray[np.int64],
        seconds: npt.NDArray[np.float64],
    ) -> None:
        """Blocks of `layers` [m] have run on `tokens` [m] each, for `seconds` [m]."""
        self._ran_s[kind][layers] += tokens * seconds
        self._busy_s[kind] += float(seconds.sum())
        self._batch_sizes[kind].observe_each(layers, tokens)

    def arrived(self, batches: Sequence[Batch]) -> None:
        """The loop has looked for batches. Those that came while it ran a step have waited half of it, on average."""
        if self._unseen_s:
            tokens = sum(batch.count for batch in batches if batch.kind is BatchKind.DISPATCH)
            self.expert_wait_s += tokens * self._unseen_s / 2
            self._unseen_s = 0.0

    def waited(self, depth: npt.NDArray[np.int64], seconds: float, *, busy: bool = False) -> None:
        """While the loop ran a step (`busy`) or slept, `depth` tokens were in the μ-queues, by their index. Who is in a
        queue while the worker sleeps waits for tokens that are elsewhere, not for the worker."""
        self._waited_s = self._waited_s + depth * seconds
        if busy:
            self.expert_wait_s += float(depth.sum()) * seconds

    def slept(self, seconds: float, reason: Reason) -> None:
        """The loop had nothing to run."""
        self._wait_s[reason] += seconds
        self._unseen_s = 0.0

    def sent(self, batch: Batch) -> None:
        """A batch is about to be sent."""
        self._traffic.count(batch)

    def snapshot(self, core: WorkerCore, now: float) -> WorkerStats:
        """Everything, as it is now."""
        busy_s, experts_s = sum(self._busy_s.values()), self._busy_s[BlockKind.EXPERTS]
        stats = WorkerStats(self.rank, self.role, self.loops, busy_s, self.steps, modelled_s=self._modelled_s())
        stats.home_s, stats.experts_s = busy_s - experts_s, experts_s
        stats.busy_by_block = self._busy_by_block(core)
        stats.wait_s = {reason.name.lower(): seconds for reason, seconds in self._wait_s.items()}
        stats.decisions, stats.traffic = core.decisions.snapshot(), self._traffic.snapshot()
        stats.expert_work = self.expert_work
        if self.role == "experts":  # elsewhere tokens of other blocks are in the queues too
            stats.expert_wait_s = self.expert_wait_s
        stats.at_s = now
        stats.num_waves, stats.num_slips = core.num_waves, core.num_slips
        stats.queues = self._queues(core, now)
        stats.batch_sizes = [item for kind in BlockKind for item in self._batch_sizes[kind].snapshot(_NAMES[kind])]
        if core.holds(BlockKind.EXPERTS):
            stats.expert_pairs = self._expert_pairs.tolist()
        if core.batcher is not None:
            stats.iteration_tokens = next(iter(self._iterations.snapshot("attention")), None)
            _describe_sequences(stats, core.batcher)
        if core.attention is not None:
            _describe_dispatches(stats, core.attention)
        return stats

    def _busy_by_block(self, core: WorkerCore) -> dict[str, float]:
        """Of the kinds of block that live here."""
        return {_NAMES[kind]: seconds for kind, seconds in self._busy_s.items() if core.holds(kind)}

    def _queues(self, core: WorkerCore, now: float) -> list[QueueSnapshot]:
        """Of the blocks that live here; the waves of a block share one."""
        queues = core.queues
        waited_s = np.broadcast_to(self._waited_s, queues.depth.shape)
        snapshots: dict[tuple[BlockKind, int], QueueSnapshot] = {}
        for index in range(len(queues.depth)):
            block = queues.block(index)
            if not core.holds(block.kind):
                continue
            depth = int(queues.depth[index])
            age = max(0.0, now - float(queues.oldest[index])) if depth else 0.0
            ran_s = float(self._ran_s[block.kind][block.layer])
            new = QueueSnapshot(_NAMES[block.kind], block.layer, 0, 0.0, ran_s=ran_s)
            snapshot = snapshots.setdefault((block.kind, block.layer), new)
            snapshot.depth += depth
            snapshot.age_s = max(snapshot.age_s, age)
            snapshot.waited_s += float(waited_s[index])
        return list(snapshots.values())


def _describe_dispatches(stats: WorkerStats, attention: AttentionCore) -> None:
    stats.join_waits = attention.join_waits.snapshot("experts")
    if attention.capacity is not None:
        stats.capacity = attention.capacity.snapshot()
    recovery = attention.recovery
    stats.redone_tokens, stats.resent_tokens = recovery.losses.redone, recovery.losses.resent
    stats.parked_tokens = recovery.num_parked


def _describe_sequences(stats: WorkerStats, batcher: Batcher) -> None:
    stats.num_running = len(batcher.running)
    stats.num_waiting, stats.num_deferred = len(batcher.waiting), batcher.waiting.num_aside
    stats.kv_blocks_used = batcher.blocks.num_used
    stats.kv_blocks_total = batcher.blocks.num_blocks
    stats.token_slots_used = batcher.slots.num_slots - batcher.slots.num_free
    stats.num_preemptions = batcher.num_preemptions
    stats.prefix_queries = batcher.blocks.num_queries
    stats.prefix_hits = batcher.blocks.num_hits

"""One moment of the engine: what the live view is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from amoe.cluster.admin import ClusterStatus
from amoe.stats import FlowSample, WorkerStats

Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]


KINDS = ("attention", "experts", "head")


@dataclass(slots=True)
class BlockTotals:
    """Cumulative counts of one kind of block, summed over the workers; each [num_layers], the head's [1].

    Attributes:
        steps, tokens: runs of the block, and tokens in them.
        waited_s, ran_s: seconds that tokens have waited for it, and been in it, summed over the tokens.
    """

    steps: Float64Array
    tokens: Float64Array
    waited_s: Float64Array
    ran_s: Float64Array

    @classmethod
    def zeros(cls, num_layers: int) -> BlockTotals:
        """Nothing yet."""
        return cls(*(np.zeros(num_layers) for _ in range(4)))

    def minus(self, before: BlockTotals) -> BlockTotals:
        """What has come since `before`."""
        return BlockTotals(
            self.steps - before.steps,
            self.tokens - before.tokens,
            self.waited_s - before.waited_s,
            self.ran_s - before.ran_s,
        )


@dataclass(slots=True)
class Totals:
    """Cumulative counts, summed over the workers.

    Attributes:
        pairs: [num_layers, num_experts] (token, expert) pairs computed.
        blocks: by kind, see `KINDS`.
        joins, join_wait_s: [num_layers] tokens whose answers are all in, and how long they waited for them.
    """

    pairs: Int64Array
    blocks: dict[str, BlockTotals]
    joins: Float64Array
    join_wait_s: Float64Array

    @classmethod
    def of(cls, workers: Sequence[WorkerStats]) -> Totals:
        """Sums of these snapshots."""
        pairs = _sum_pairs(workers)
        num_layers = max(
            [len(pairs), *(1 + q.layer for worker in workers for q in worker.queues if q.kind != "head")], default=0
        )
        blocks = {kind: BlockTotals.zeros(1 if kind == "head" else num_layers) for kind in KINDS}
        totals = cls(pairs, blocks, np.zeros(num_layers), np.zeros(num_layers))
        for worker in workers:
            totals._add(worker)
        return totals

    @property
    def num_layers(self) -> int:
        return len(self.joins)

    def minus(self, before: Totals) -> Totals | None:
        """What has come since `before`; None if the two do not fit: a worker has told for the first time."""
        if self.pairs.shape != before.pairs.shape or self.num_layers != before.num_layers:
            return None
        return Totals(
            self.pairs - before.pairs,
            {kind: self.blocks[kind].minus(before.blocks[kind]) for kind in KINDS},
            self.joins - before.joins,
            self.join_wait_s - before.join_wait_s,
        )

    def _add(self, worker: WorkerStats) -> None:
        for queue in worker.queues:
            block, layer = self.blocks[queue.kind], 0 if queue.kind == "head" else queue.layer
            block.waited_s[layer] += queue.waited_s
            block.ran_s[layer] += queue.ran_s
        for item in worker.batch_sizes:
            block, layer = self.blocks[item.kind], 0 if item.kind == "head" else item.layer
            block.steps[layer] += sum(item.counts)
            block.tokens[layer] += item.total
        for item in worker.join_waits:
            self.joins[item.layer] += sum(item.counts)
            self.join_wait_s[item.layer] += item.total


def _sum_pairs(workers: Sequence[WorkerStats]) -> Int64Array:
    """[num_layers, num_experts], or [0, 0] as long as no expert worker has told."""
    arrays = [np.array(worker.expert_pairs, np.int64) for worker in workers if worker.expert_pairs]
    return np.sum(arrays, axis=0) if arrays else np.zeros((0, 0), np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """All that a view needs of one moment.

    Attributes:
        at_s: the server's clock.
        workers: the latest word of each worker, by rank.
        totals: their sums.
        silent_s: seconds since a worker's latest word, as far as that has been watched.
        flow: the last minutes, oldest first; the last one is of now.
        num_open: requests that have not ended.
        is_healthy: every worker makes progress, or is being replaced.
        word: what is the matter, for a person; "" if nothing is.
        cluster: who there is, and ought to be; None: nobody supervises the workers.
    """

    at_s: float
    workers: Mapping[int, WorkerStats]
    totals: Totals
    flow: Sequence[FlowSample]
    silent_s: Mapping[int, float] = field(default_factory=dict)
    num_open: int = 0
    is_healthy: bool = True
    word: str = ""
    cluster: ClusterStatus | None = None

"""The expert side of a worker: tokens of all homes wait for the experts of a layer that live here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from amoe.core.backlog import WorkMeter
from amoe.core.expert_waves import ExpertWaves
from amoe.core.lockstep import ExpertsBarrier
from amoe.core.micro_queue import MicroQueues
from amoe.core.steps import ExpertsStep, Outgoing
from amoe.types import Batch, BatchKind, BlockId, BlockKind, BoolArray, Int16Array, Int32Array, Int64Array

_LAYERS_PER_GENERATION = 2**16  # layers travel in 16 bits
_NOTHING: BoolArray = np.empty(0, np.bool_)
_EXPERT_IDS = 3  # of the columns that wait in a queue


class ExpertsCore:
    """Queues dispatched tokens and turns them into steps. Stateless but for its queues: homes keep what matters.

    Args:
        rank: of this worker.
        home_ranks: ranks of the attention workers.
        slots_per_home: token slots of each: (home, slot) names the place of a token's MoE input. A token is in one
            place at a time, so no two live tokens share it.
        barrier: lockstep only.
        waves: schedule `waves` only.
        meter: what homes are told of the work that waits here; None: nothing.
    """

    def __init__(
        self,
        *,
        rank: int,
        home_ranks: Sequence[int],
        slots_per_home: int,
        queues: MicroQueues,
        barrier: ExpertsBarrier | None = None,
        waves: ExpertWaves | None = None,
        meter: WorkMeter | None = None,
    ) -> None:
        self.rank = rank
        self._home_ranks = tuple(home_ranks)
        self._home_of_rank = {home_rank: home for home, home_rank in enumerate(home_ranks)}
        self._slots_per_home = slots_per_home
        self._queues = queues
        self._barrier = barrier
        self._waves = waves
        self._meter = meter
        self._latest_iteration = 0
        # Where the token in each place of the slab stands: its slot's generation, then the layer.
        self._stamps: Int64Array = np.full(len(home_ranks) * slots_per_home, -1, np.int64)

    def slab_rows(self, batch: Batch) -> Int32Array:
        """[n] where the payload of a dispatch belongs."""
        return batch.slots + np.int32(self._home_of_rank[batch.src] * self._slots_per_home)

    def on_dispatch(self, batch: Batch, now: float) -> BoolArray:
        """Tokens have come. Copies the columns: the batch's memory belongs to the transport.

        Returns:
            [n]: the row's payload has to be kept. A late copy of what the token has left behind must not overwrite
            its place in the slab; it is False, and not queued.
        """
        lane = self._waves.on_dispatch(batch) if self._waves is not None else batch.wave
        if self._barrier is not None:
            self._barrier.on_dispatch(batch)
        if batch.count == 0:  # a marker: there are many
            return _NOTHING
        rows = self.slab_rows(batch)
        stamps = batch.generations.astype(np.int64) * _LAYERS_PER_GENERATION + batch.layer
        fresh = stamps >= self._stamps[rows]
        self._stamps[rows[fresh]] = stamps[fresh]
        iterations = batch.iterations[fresh]  # a mask copies
        columns = (
            np.full(len(iterations), self._home_of_rank[batch.src], np.int32),
            batch.slots[fresh],
            batch.generations[fresh],
            batch.expert_ids[fresh],
            batch.expert_weights[fresh],
        )
        self._queues.push(BlockId(BlockKind.EXPERTS, batch.layer, lane), columns, iterations, now)
        if len(iterations):
            self._latest_iteration = max(self._latest_iteration, int(iterations.max()))
        return fresh

    def on_home_changed(self, rank: int, *, is_there: bool) -> None:
        """The home is gone, or another life of it is there: what it has sent is nobody's business any more."""
        home, slots = self._home_of_rank[rank], self._slots_per_home
        self._stamps[home * slots : (home + 1) * slots] = -1
        for index in np.flatnonzero(self._queues.depth).tolist():
            if self._queues.block(index).kind is BlockKind.EXPERTS:
                self._queues.keep_only(index, lambda columns: columns[0] != home)
        if self._waves is not None:
            self._waves.on_home_changed(home, is_there=is_there)

    def awaits(self, layer: int, experts: BoolArray) -> bool:
        """Some token in the queues of a layer needs one of the experts [num_experts]."""
        needed = np.append(experts, False)  # id -1 reads the last entry
        return any(
            bool(needed[columns[_EXPERT_IDS]].any())
            for lane in range(self._queues.num_waves)
            for columns in self._queues.pushes(self._queues.index(BlockId(BlockKind.EXPERTS, layer, lane)))
        )

    def experts_step(self, index: int) -> ExpertsStep:
        """Take all tokens that wait for the experts of a layer, sorted by home, so that every home gets one answer."""
        block = self._queues.block(index)
        columns = self._queues.drain(index)
        if self._waves is not None:
            self._waves.on_run(block)
        if columns is None:
            empty = np.empty(0, np.int32)
            columns = (empty, empty, empty, np.empty((0, 1), np.int16), np.empty((0, 1), np.float32))
        homes, slots, generations, expert_ids, weights = columns
        if len(self._home_ranks) > 1 and len(homes):
            order = np.argsort(homes, kind="stable")
            homes, slots, generations = homes[order], slots[order], generations[order]
            expert_ids, weights = expert_ids[order], weights[order]
        replies = self._replies(block, homes, slots, generations)
        slab_rows = homes * np.int32(self._slots_per_home) + slots
        return ExpertsStep(block, slab_rows, expert_ids, weights, replies)

    def _replies(self, block: BlockId, homes: Int32Array, slots: Int32Array, generations: Int32Array) -> list[Outgoing]:
        epoch, waiting = self._barrier.complete(block) if self._barrier is not None else (0, frozenset())
        backlog_s, row_s = self._meter.measure() if self._meter is not None else (0.0, -1.0)
        bounds = np.searchsorted(homes, np.arange(len(self._home_ranks) + 1))
        replies = []
        for home, home_rank in enumerate(self._home_ranks):
            start, end = int(bounds[home]), int(bounds[home + 1])
            if start == end and home_rank not in waiting:
                continue
            batch = Batch(
                kind=BatchKind.RESULT,
                src=self.rank,
                dst=home_rank,
                layer=block.layer,
                wave=block.wave,
                epoch=epoch,
                count=end - start,
                slots=slots[start:end],
                generations=generations[start:end],
                latest_iteration=self._latest_iteration,
                backlog_s=backlog_s,
                row_s=row_s,
            )
            replies.append(Outgoing(batch, slice(start, end)))
        return replies


def count_pairs(expert_ids: Int16Array, num_experts: int) -> Int32Array:
    """[num_experts] (token, expert) pairs in `expert_ids` [n, K], -1 not counted."""
    return np.bincount(expert_ids.ravel() + 1, minlength=num_experts + 1)[1:].astype(np.int32)


def count_pairs_by_layer(expert_ids: Sequence[npt.NDArray[np.int64]], num_experts: int) -> Int64Array:
    """[len(expert_ids), num_experts] pairs of several layers, each of which brings its ids [n, K], none of them -1."""
    num_layers = len(expert_ids)
    flat = np.concatenate([ids.ravel() for ids in expert_ids]) if num_layers else np.empty(0, np.int64)
    flat += np.repeat(np.arange(num_layers) * num_experts, [ids.size for ids in expert_ids])
    return np.bincount(flat, minlength=num_layers * num_experts).reshape(num_layers, num_experts)

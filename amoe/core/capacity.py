"""Capacity at a home: which pairs of a step are touched, who computes the others, and what is told about it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from amoe.config import CapacityConfig
from amoe.core.backlog import OwnerBacklog
from amoe.core.batcher import Batcher
from amoe.core.replica_shares import ReplicaShares
from amoe.core.sequence import NUM_USAGE_COLUMNS, UsageColumn
from amoe.policy import capacity as policy
from amoe.policy.backlog import ends_of, hysteresis, late_pairs, move_to_replicas, receivers, two_choices
from amoe.policy.capacity import RoutedBatch, Selection
from amoe.stats import CapacitySnapshot
from amoe.types import Batch, BoolArray, Float32Array, Int16Array, Int32Array, Int64Array


class Pairs(NamedTuple):
    """What is computed for the n tokens of a step.

    Attributes:
        expert_ids: [n, P] int64, -1 where there is none.
        weights: [n, P] float32.
        owners: [n, P] who computes the pair, -1 where there is none.
    """

    expert_ids: npt.NDArray[np.int64]
    weights: Float32Array
    owners: Int16Array


class CapacityLedger:
    """What has been taken from whom, cumulative.

    Attributes:
        lost: [num_layers, num_experts, 2] pairs that an expert was spared: dropped, rerouted to another expert.
        num_over: pairs beyond the capacity that were computed all the same: of exact requests, or a token's best.
        mass_lost, tokens: sum over tokens and layers of the lost part of the gate mass, and how many they were.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.lost: Int64Array = np.zeros((num_layers, num_experts, 2), np.int64)
        self.num_over = 0
        self.mass_lost = 0.0
        self.tokens = 0

    def snapshot(self, reason: str) -> CapacitySnapshot:
        """For the server; `reason`: why pairs are taken."""
        layers, experts = np.nonzero(self.lost.any(axis=-1))
        lost = np.column_stack((layers, experts, self.lost[layers, experts]))
        return CapacitySnapshot(reason, lost.tolist(), self.num_over, self.mass_lost, self.tokens)

    def count(self, layer: int, topk_ids: Int64Array, selection: Selection, mass_lost: policy.FloatArray) -> None:
        """A selection has been made. Of a token's lost pairs the best count as those that were rerouted.

        Args:
            mass_lost: [n] part of each token's gate mass.
        """
        self.num_over += selection.num_over
        self.mass_lost += float(mass_lost.sum())
        self.tokens += len(mass_lost)
        if not selection.touched.any():
            return
        rank = np.cumsum(selection.lost, axis=1)
        rerouted = selection.lost & (rank <= selection.num_rerouted[:, None])
        for column, pairs in enumerate((selection.lost & ~rerouted, rerouted)):
            np.add.at(self.lost[layer, :, column], topk_ids[pairs], 1)


def _widened(pairs: Pairs, width: int) -> Pairs:
    """The same with `width` columns."""
    missing = ((0, 0), (0, width - pairs.expert_ids.shape[1]))
    return Pairs(
        np.pad(pairs.expert_ids, missing, constant_values=-1),
        np.pad(pairs.weights, missing),
        np.pad(pairs.owners, missing, constant_values=-1),
    )


class HomeCapacity:
    """The decisions of one home.

    Args:
        renormalise: the model's router gives weights that sum to one.
        local_owner: index of this very worker among the expert workers; None if it holds no experts.
    """

    def __init__(
        self,
        config: CapacityConfig,
        replicas: ReplicaShares,
        batcher: Batcher,
        *,
        seed: int,
        renormalise: bool,
        num_owners: int,
        local_owner: int | None,
    ) -> None:
        self._config = config
        self._replicas = replicas
        self._batcher = batcher
        self._seed = seed
        self._renormalise = renormalise
        self._local_owner = local_owner
        num_layers, num_experts, _ = replicas.owners.shape
        self.ledger = CapacityLedger(num_layers, num_experts)
        self._num_experts = num_experts
        self._backlog: OwnerBacklog | None = None
        if config.slack_s is not None:
            self._backlog = OwnerBacklog(num_owners, config.slack_s, config.telemetry_s)

    def decide(
        self,
        layer: int,
        slots: Int32Array,
        is_prefill: BoolArray,
        topk_ids: npt.NDArray[np.int64],
        topk_weights: Float32Array,
        scores: Float32Array,
        now: float,
    ) -> Pairs:
        """Which pairs of the tokens in `slots` [n] are computed, and where.

        Args:
            is_prefill: [n] prompt tokens.
            topk_ids, topk_weights: [n, K] what the router wants, and its weights.
            scores: [n, E] its softmax over all experts.
        """
        batch = self._batch(layer, slots, is_prefill, topk_ids, scores)
        owners = self._replicas.choose(layer, topk_ids)
        if self._backlog is not None:
            owners, selection = self._relieve(layer, slots, batch, owners, scores, self._backlog, now)
        elif batch.droppable.any():
            selection = self._select(layer, batch, owners, scores)
        else:
            selection = policy.untouched(batch)
        mass_lost = policy.mass_lost(selection, batch.topk_scores)
        self.ledger.count(layer, topk_ids, selection, mass_lost)
        self._account(slots, batch, selection, mass_lost)
        weights = policy.weigh(selection, topk_weights, renormalise=self._renormalise)
        pairs = Pairs(selection.expert_ids, weights, self._owners(layer, topk_ids, owners, selection))
        width = self._config.pairs_per_token(topk_ids.shape[1], self._num_experts)
        return pairs if pairs.expert_ids.shape[1] == width else _widened(pairs, width)

    def _batch(
        self,
        layer: int,
        slots: Int32Array,
        is_prefill: BoolArray,
        topk_ids: npt.NDArray[np.int64],
        scores: Float32Array,
    ) -> RoutedBatch:
        tokens, table = self._batcher.tokens, self._batcher.table
        rows = tokens.row[slots]
        droppable = ~table.is_exact[rows]
        if self._config.phase != "both":
            droppable &= is_prefill if self._config.phase == "prefill" else ~is_prefill
        noise = None
        if self._config.metric == "random":
            noise = policy.pair_noise(self._seed, self._names(layer, slots), topk_ids)
        topk_scores = np.take_along_axis(scores, topk_ids, axis=1)
        return RoutedBatch(topk_ids, topk_scores, droppable, tokens.drop_first[slots], noise)

    def _names(self, layer: int, slots: Int32Array) -> npt.NDArray[np.uint64]:
        """[n] names of tokens at a layer: the same whatever else is in the batch."""
        tokens, table = self._batcher.tokens, self._batcher.table
        names = table.request_id[tokens.row[slots]].astype(np.uint64) << np.uint64(32)
        return names ^ (tokens.position[slots].astype(np.uint64) << np.uint64(10)) ^ np.uint64(layer)

    def _relieve(
        self,
        layer: int,
        slots: Int32Array,
        batch: RoutedBatch,
        owners: Int16Array,
        scores: Float32Array,
        backlog: OwnerBacklog,
        now: float,
    ) -> tuple[Int16Array, Selection]:
        """Owners [n, K] after moves to replicas, and the pairs that are left where workers are late."""
        waits, num_owners = backlog.waits(now), self._replicas.num_owners
        ends = ends_of(receivers(owners, num_owners), waits)
        assert self._config.slack_s is not None
        backlog.late = hysteresis(backlog.late, ends, waits.is_known, self._config.slack_s)
        if not backlog.late.any():
            return owners, policy.untouched(batch)
        owners = move_to_replicas(batch, owners, self._replicas.owners[layer], waits, backlog.late)
        lost = late_pairs(batch, owners, waits, backlog.late, keep_best=self._config.keep_best)
        if self._config.mode == "drop" or not lost.any():
            return owners, policy.without(batch, lost)
        goes = receivers(np.where(lost, np.int16(-1), owners), num_owners)
        draws = np.broadcast_to(np.arange(2), (len(slots), 2))
        noise = policy.pair_noise(self._seed, self._names(layer, slots), draws)
        new = two_choices(batch, lost, scores, self._replicas.main_owner(layer), goes, waits, noise)
        return owners, policy.replaced(batch, lost, new, scores)

    def heard(self, owner: int, batch: Batch, now: float) -> None:
        """An answer has come, with what the expert worker tells of its backlog."""
        if self._backlog is not None:
            self._backlog.hear(owner, batch.backlog_s, batch.row_s, now)

    def sent(self, dispatched: BoolArray) -> None:
        """Rows `dispatched` [n, D] are on their way."""
        if self._backlog is not None:
            self._backlog.send(dispatched.sum(axis=0))

    def _select(self, layer: int, batch: RoutedBatch, owners: Int16Array, scores: Float32Array) -> Selection:
        config = self._config
        assert config.factor is not None
        num_pairs = batch.topk_ids.size
        if config.scope == "expert":
            groups, group_of_expert = batch.topk_ids, np.arange(self._num_experts)
            even = policy.expert_capacity(config.factor, num_pairs, self._num_experts)
            capacity = np.full(self._num_experts, even)
        else:
            groups, group_of_expert = owners.astype(np.int64), self._replicas.main_owner(layer)
            capacity = policy.group_capacity(config.factor, num_pairs, self._replicas.experts_held(layer))
        if config.mode == "drop":
            return policy.drop(batch, groups, capacity, metric=config.metric, keep_best=config.keep_best)
        if config.mode == "reroute":
            return policy.reroute(batch, groups, capacity, scores, group_of_expert, keep_best=config.keep_best)
        local = self._receivers(owners) @ self._replicas.holds(layer).T
        return policy.expand(
            batch,
            capacity,
            scores,
            group_of_expert,
            local,
            at_most_k=not config.exceed_top_k,
            keep_best=config.keep_best,
        )

    def _receivers(self, owners: Int16Array) -> BoolArray:
        """[n, D] expert workers that an additional pair of a token costs no transfer: this very one; where it holds no
        experts, those to which the token's other pairs (of `owners` [n, K]) go."""
        receives = np.zeros((len(owners), self._replicas.num_owners), np.bool_)
        if self._local_owner is not None:
            receives[:, self._local_owner] = True
        else:
            np.put_along_axis(receives, owners.astype(np.int64), values=True, axis=1)
        return receives

    def _owners(
        self, layer: int, topk_ids: npt.NDArray[np.int64], owners: Int16Array, selection: Selection
    ) -> Int16Array:
        """[n, P]: the router's pairs stay where they are; new ones go where a transfer is free, or to the replica that
        has the greatest share."""
        ids = selection.expert_ids
        chosen = np.full(ids.shape, -1, np.int16)
        chosen[:, : owners.shape[1]] = owners
        rows = np.flatnonzero(selection.touched)
        known = np.full((len(rows), self._num_experts), -1, np.int16)
        np.put_along_axis(known, topk_ids[rows], owners[rows], axis=1)
        touched = np.where(ids[rows] >= 0, np.take_along_axis(known, np.maximum(ids[rows], 0), axis=1), -1)
        at, column = np.nonzero((ids[rows] >= 0) & (touched < 0))
        if len(at):
            experts = ids[rows[at], column]
            free = self._receivers(owners[rows[at]]) & self._replicas.holds(layer)[experts]
            touched[at, column] = np.where(
                free.any(axis=1), free.argmax(axis=1), self._replicas.main_owner(layer)[experts]
            )
        chosen[rows] = touched
        return chosen

    def snapshot(self) -> CapacitySnapshot:
        """All that has been taken so far."""
        return self.ledger.snapshot("factor" if self._backlog is None else "slack")

    def _account(
        self, slots: Int32Array, batch: RoutedBatch, selection: Selection, mass_lost: policy.FloatArray
    ) -> None:
        columns = np.empty((len(slots), NUM_USAGE_COLUMNS))
        columns[:, UsageColumn.PAIRS] = batch.is_pair.sum(axis=1)
        columns[:, UsageColumn.DROPPED] = selection.num_dropped
        columns[:, UsageColumn.REROUTED] = selection.num_rerouted
        columns[:, UsageColumn.MASS_LOST] = mass_lost
        columns[:, UsageColumn.TOKENS] = 1
        np.add.at(self._batcher.table.usage, self._batcher.tokens.row[slots], columns)

"""Capacity at a home: which pairs of a step are touched, who computes the others, and what is told about it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from amoe.config import CapacityConfig
from amoe.core.batcher import Batcher
from amoe.core.replica_shares import ReplicaShares
from amoe.core.sequence import NUM_USAGE_COLUMNS, UsageColumn
from amoe.policy import capacity as policy
from amoe.policy.capacity import RoutedBatch, Selection
from amoe.types import BoolArray, Float32Array, Int16Array, Int32Array, Int64Array


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
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.lost: Int64Array = np.zeros((num_layers, num_experts, 2), np.int64)
        self.num_over = 0

    def count(self, layer: int, topk_ids: Int64Array, selection: Selection) -> None:
        """A selection has been made. Of a token's lost pairs the best count as those that were rerouted."""
        self.num_over += selection.num_over
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

    def decide(
        self,
        layer: int,
        slots: Int32Array,
        is_prefill: BoolArray,
        topk_ids: npt.NDArray[np.int64],
        topk_weights: Float32Array,
        scores: Float32Array,
    ) -> Pairs:
        """Which pairs of the tokens in `slots` [n] are computed, and where.

        Args:
            is_prefill: [n] prompt tokens.
            topk_ids, topk_weights: [n, K] what the router wants, and its weights.
            scores: [n, E] its softmax over all experts.
        """
        batch = self._batch(layer, slots, is_prefill, topk_ids, scores)
        owners = self._replicas.choose(layer, topk_ids)
        selection = self._select(layer, batch, owners, scores) if batch.droppable.any() else policy.untouched(batch)
        self.ledger.count(layer, topk_ids, selection)
        self._account(slots, batch, selection)
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
            names = table.request_id[rows].astype(np.uint64) << np.uint64(32)
            names ^= (tokens.position[slots].astype(np.uint64) << np.uint64(10)) ^ np.uint64(layer)
            noise = policy.pair_noise(self._seed, names, topk_ids)
        topk_scores = np.take_along_axis(scores, topk_ids, axis=1)
        return RoutedBatch(topk_ids, topk_scores, droppable, tokens.drop_first[slots], noise)

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

    def _account(self, slots: Int32Array, batch: RoutedBatch, selection: Selection) -> None:
        columns = np.empty((len(slots), NUM_USAGE_COLUMNS))
        columns[:, UsageColumn.PAIRS] = batch.is_pair.sum(axis=1)
        columns[:, UsageColumn.DROPPED] = selection.num_dropped
        columns[:, UsageColumn.REROUTED] = selection.num_rerouted
        columns[:, UsageColumn.MASS_LOST] = policy.mass_lost(selection, batch.topk_scores)
        columns[:, UsageColumn.TOKENS] = 1
        np.add.at(self._batcher.table.usage, self._batcher.tokens.row[slots], columns)

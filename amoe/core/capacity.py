"""Capacity at a home: which pairs of a step are touched, and who computes the others."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from amoe.config import CapacityConfig
from amoe.core.backlog import OwnerBacklog
from amoe.core.batcher import Batcher
from amoe.core.capacity_ledger import CapacityLedger
from amoe.core.dispatcher import Pairs
from amoe.core.replica_shares import ReplicaShares
from amoe.policy import capacity as policy
from amoe.policy.backlog import ends_of, hysteresis, late_pairs, move_to_replicas, receivers, two_choices
from amoe.policy.capacity import RoutedBatch, Selection
from amoe.stats import CapacitySnapshot
from amoe.types import Batch, BoolArray, Float32Array, Int16Array, Int32Array


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
        degrades: an expert that nobody holds has no capacity; otherwise its tokens wait for it.
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
        degrades: bool = False,
    ) -> None:
        self._config = config
        self._degrades = degrades
        self._replicas = replicas
        self._batcher = batcher
        self._seed = seed
        self._renormalise = renormalise
        self._local_owner = local_owner
        self._nobody = replicas.num_owners - 1
        num_layers, self._num_experts, _ = replicas.owners.shape
        self.ledger = CapacityLedger(num_layers, self._num_experts)
        self._backlog: OwnerBacklog | None = None
        if config.slack_s is not None:
            num_slots = batcher.slots.num_slots
            self._backlog = OwnerBacklog(replicas.num_owners, num_slots, config.slack_s, config.telemetry_s)

    def decide(
        self,
        layer: int,
        slots: Int32Array,
        is_prefill: BoolArray,
        wanted: Pairs,
        scores: Float32Array,
        now: float,
    ) -> Pairs:
        """Which pairs of the tokens in `slots` [n] are computed, and where.

        Args:
            is_prefill: [n] prompt tokens.
            wanted: [n, K] what the router wants, its weights, and the replicas that would compute it.
            scores: [n, E] its softmax over all experts.
        """
        droppable = self._droppable(slots, is_prefill)
        if self._degrades and self._replicas.has_missing[layer]:
            pairs = self.spare_missing(layer, slots, wanted, scores)
        elif self._backlog is not None:
            pairs = self._relieve(layer, slots, droppable, wanted, scores, now)
        elif self._config.factor is not None and droppable.any():
            pairs = self._cap(layer, slots, droppable, wanted, scores)
        else:
            pairs = self._untouched(slots, wanted)
        width = self.pairs_per_token(wanted.expert_ids.shape[1])
        return pairs if pairs.expert_ids.shape[1] == width else _widened(pairs, width)

    def pairs_per_token(self, top_k: int) -> int:
        """P: columns of all pairs that are decided."""
        return self._config.pairs_per_token(top_k, self._num_experts)

    def _droppable(self, slots: Int32Array, is_prefill: BoolArray) -> BoolArray:
        """[n] tokens of which pairs may be touched."""
        is_exact = self._batcher.table.is_exact[self._batcher.tokens.row[slots]]
        phase = self._config.phase
        return ~is_exact if phase == "both" else ~is_exact & (is_prefill if phase == "prefill" else ~is_prefill)

    def _untouched(self, slots: Int32Array, wanted: Pairs) -> Pairs:
        self.ledger.untouched(self._batcher.table, self._batcher.tokens.row[slots], wanted.expert_ids.shape[1])
        return wanted

    def _batch(
        self, layer: int, slots: Int32Array, droppable: BoolArray, wanted: Pairs, scores: Float32Array
    ) -> RoutedBatch:
        topk_ids = wanted.expert_ids
        noise = None
        if self._config.metric == "random":
            noise = policy.pair_noise(self._seed, self._names(layer, slots), topk_ids)
        topk_scores = np.take_along_axis(scores, topk_ids, axis=1)
        return RoutedBatch(topk_ids, topk_scores, droppable, self._batcher.tokens.drop_first[slots], noise)

    def _names(self, layer: int, slots: Int32Array) -> npt.NDArray[np.uint64]:
        """[n] names of tokens at a layer: the same whatever else is in the batch."""
        tokens, table = self._batcher.tokens, self._batcher.table
        names = table.request_id[tokens.row[slots]].astype(np.uint64) << np.uint64(32)
        return names ^ (tokens.position[slots].astype(np.uint64) << np.uint64(10)) ^ np.uint64(layer)

    # ---- nobody holds an expert

    def spare_missing(
        self, layer: int, slots: Int32Array, wanted: Pairs, scores: Float32Array, *, again: bool = False
    ) -> Pairs:
        """Pairs [n, P] of experts that nobody holds go to the token's best experts that somebody does, as far as it
        has not those already, and are dropped otherwise. Exact requests keep theirs, and wait.

        Args:
            again: the tokens have passed this layer before, and are in the accounts.
        """
        is_exact = self._batcher.table.is_exact[self._batcher.tokens.row[slots]]
        topk_ids = wanted.expert_ids
        topk_scores = np.where(topk_ids >= 0, np.take_along_axis(scores, np.maximum(topk_ids, 0), axis=1), 0.0)
        batch = RoutedBatch(topk_ids, topk_scores.astype(np.float32), ~is_exact, np.zeros(len(slots), np.bool_), None)
        lost = (wanted.owners == self._nobody) & ~is_exact[:, None]
        main_owner = self._replicas.main_owner(layer)
        new = best_others(scores, topk_ids, main_owner != self._nobody, lost.sum(axis=1))
        selection = policy.replaced(batch, lost, new, scores)
        return self._selected(layer, slots, batch, wanted, selection, main_owner, again=again)

    # ---- a cap on the batch

    def _cap(self, layer: int, slots: Int32Array, droppable: BoolArray, wanted: Pairs, scores: Float32Array) -> Pairs:
        config, main_owner = self._config, self._replicas.main_owner(layer)
        batch = self._batch(layer, slots, droppable, wanted, scores)
        if config.mode == "expanded":
            return self._expand(layer, slots, batch, wanted, scores)
        capacity, by_device = self._capacity(layer, batch), config.scope == "device"
        groups = wanted.owners.astype(np.int64) if by_device else batch.topk_ids
        if config.mode == "drop":
            selection = policy.drop(batch, groups, capacity, metric=config.metric, keep_best=config.keep_best)
        else:
            group_of_expert = main_owner if by_device else np.arange(self._num_experts)
            selection = policy.reroute(
                batch,
                groups,
                capacity,
                scores,
                group_of_expert,
                is_there=main_owner != self._nobody,
                keep_best=config.keep_best,
            )
        return self._selected(layer, slots, batch, wanted, selection, main_owner)

    def _capacity(self, layer: int, batch: RoutedBatch) -> npt.NDArray[np.int64]:
        """[G] pairs of the batch that each expert, or worker, may take."""
        assert self._config.factor is not None
        per_group = np.ones(self._num_experts)
        if self._config.scope == "device":
            per_group = self._replicas.experts_held(layer)
        return policy.group_capacity(self._config.factor, batch.topk_ids.size, per_group)

    def _expand(self, layer: int, slots: Int32Array, batch: RoutedBatch, wanted: Pairs, scores: Float32Array) -> Pairs:
        config = self._config
        places, local = self._places(layer, batch, wanted)
        groups = places.astype(np.int64)
        if config.scope == "expert":
            groups = np.broadcast_to(np.arange(self._num_experts), scores.shape)
        selection = policy.expand(
            batch,
            self._capacity(layer, batch),
            scores,
            groups,
            local,
            at_most_k=not config.exceed_top_k,
            keep_best=config.keep_best,
        )
        return self._selected(layer, slots, batch, wanted, selection, places)

    def _places(self, layer: int, batch: RoutedBatch, wanted: Pairs) -> tuple[Int16Array, BoolArray]:
        """(owner of each (token, expert) [n, E], -1 where the token cannot bid; whether it costs no transfer [n, E]).

        Free are experts at this very worker; where it holds none, at those to which the token's pairs go anyway.
        """
        holds = self._replicas.holds(layer)
        if self._local_owner is not None:
            reached = np.zeros((len(batch.topk_ids), self._replicas.num_owners), np.bool_)
            reached[:, self._local_owner] = True
        else:
            reached = receivers(wanted.owners, self._replicas.num_owners)
        places = np.full((len(reached), self._num_experts), -1, np.int16)
        for owner in range(self._nobody):
            free = reached[:, owner, None] & holds[:, owner] & (places < 0)
            places[free] = owner
        local = places >= 0
        np.put_along_axis(places, batch.topk_ids, wanted.owners, axis=1)
        return places, local

    # ---- a cap on waiting

    def _relieve(
        self,
        layer: int,
        slots: Int32Array,
        droppable: BoolArray,
        wanted: Pairs,
        scores: Float32Array,
        now: float,
    ) -> Pairs:
        """Pairs of late workers move to replicas, and what is late even then is dropped or rerouted."""
        backlog, num_owners, config = self._backlog, self._replicas.num_owners, self._config
        assert backlog is not None and config.slack_s is not None
        waits = backlog.waits(now)
        ends = ends_of(receivers(wanted.owners, num_owners), waits)
        backlog.late = hysteresis(backlog.late, ends, waits.is_known, config.slack_s)
        if not backlog.late.any():
            return self._untouched(slots, wanted)
        batch = self._batch(layer, slots, droppable, wanted, scores)
        owners = move_to_replicas(batch, wanted.owners, self._replicas.owners[layer], waits, backlog.late)
        wanted = wanted._replace(owners=owners)
        lost = late_pairs(batch, owners, waits, backlog.late, keep_best=config.keep_best)
        if not lost.any():
            return self._untouched(slots, wanted)
        main_owner = self._replicas.main_owner(layer)
        if config.mode == "drop":
            return self._selected(layer, slots, batch, wanted, policy.without(batch, lost), main_owner)
        goes = receivers(np.where(lost, np.int16(-1), owners), num_owners)
        draws = np.broadcast_to(np.arange(2 * owners.shape[1]), (len(slots), 2 * owners.shape[1]))
        noise = policy.pair_noise(self._seed, self._names(layer, slots), draws)
        new = two_choices(batch, lost, scores, main_owner, goes, waits, backlog.late, noise)
        return self._selected(layer, slots, batch, wanted, policy.replaced(batch, lost, new, scores), main_owner)

    def heard(self, owner: int, batch: Batch, now: float) -> None:
        """An answer has come, with what the expert worker tells of its backlog."""
        if self._backlog is not None:
            self._backlog.hear(owner, batch.slots, batch.backlog_s, batch.row_s, now)

    def sent(self, slots: Int32Array, dispatched: BoolArray) -> None:
        """The tokens in `slots` [n] are on their way to the workers in `dispatched` [n, D]."""
        if self._backlog is not None:
            self._backlog.send(slots, dispatched)

    # ---- either way

    def _selected(
        self,
        layer: int,
        slots: Int32Array,
        batch: RoutedBatch,
        wanted: Pairs,
        selection: Selection,
        places: npt.NDArray[np.integer],
        *,
        again: bool = False,
    ) -> Pairs:
        """The pairs of a selection. Those of the router stay where they are, new ones go to `places` [E] or [n, E]."""
        mass_lost = policy.mass_lost(selection, batch.topk_scores)
        table, rows = self._batcher.table, self._batcher.tokens.row[slots]
        self.ledger.touched(layer, table, rows, batch, selection, mass_lost, again=again)
        ids = selection.expert_ids
        owners = np.full(ids.shape, -1, np.int16)
        owners[:, : wanted.owners.shape[1]] = wanted.owners
        at = np.flatnonzero(selection.touched)
        known = np.broadcast_to(places, (len(ids), self._num_experts))[at].astype(np.int16)
        np.put_along_axis(known, batch.topk_ids[at], wanted.owners[at], axis=1)
        owners[at] = np.where(ids[at] >= 0, np.take_along_axis(known, np.maximum(ids[at], 0), axis=1), np.int16(-1))
        weights = policy.weigh(
            selection,
            wanted.weights,
            batch.topk_scores,
            renormalise=self._renormalise,
            spread_mass=self._config.spread_mass,
        )
        return Pairs(ids, weights, owners)

    def snapshot(self) -> CapacitySnapshot:
        """All that has been taken so far."""
        reason = "slack" if self._backlog is not None else "factor" if self._config.factor is not None else "loss"
        return self.ledger.snapshot(reason)


def best_others(
    scores: Float32Array, topk_ids: npt.NDArray[np.int64], is_there: BoolArray, count: npt.NDArray[np.integer]
) -> BoolArray:
    """[n, E] for each token its `count` [n] best experts by `scores` [n, E] among those that are there [E] and that it
    has not already in `topk_ids` [n, P] (-1: none); fewer, where there are no more."""
    bids = np.where(is_there, scores, -np.inf).astype(np.float64)
    rows, columns = np.nonzero(topk_ids >= 0)
    bids[rows, topk_ids[rows, columns]] = -np.inf
    order = np.argsort(-bids, axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(scores.shape[1])[None], axis=1)
    return (rank < count[:, None]) & (bids > -np.inf)

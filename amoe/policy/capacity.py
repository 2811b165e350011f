"""Capacity of one micro-batch: which (token, expert) pairs are computed. Pure functions, decided at the source.

Capacity-Aware Inference (arXiv 2503.05066) lets an expert take at most C = γ·N̄ pairs of a batch, N̄ = n·k/E being
what each would have if all were even. *The paper's*, from its sections 3 and 4 and Algorithms 1 and 2:

- **Token Drop**: of each expert's pairs the first C by a metric stay (`score`: the highest router score; `order`: the
  earliest tokens; `reverse`: the latest; `random`). A token keeps its other pairs.
- **Token Reroute** (its first version): what overflows goes to the best expert with room that the token does not have.
- **Expanded Drop** (its third version): every token also bids for experts that cost it no transfer ("local"), and each
  expert keeps its best C bids. A token may end with more than k pairs, or, on demand, with its best k of them.
- **Device scope**: the cap is on the sum over the experts of a device. **Priorities**: some tokens (there: images) lose
  first, whatever their scores.

*Ours*, where the paper is silent or its code does something else:

- C = max(1, ceil(γ·N̄)): rounded down it would be zero for small batches. Padding counts neither in n nor in loads.
- A token's best pair is never dropped (`keep_best`), nor is any pair of a token that asked for exactness: both
  count towards the load, and what they take beyond C is reported, not hidden.
- Reroute is one assignment, not rounds in which later bids overflow again: overflowing pairs and experts with room are
  matched best score first. Scores rank both sides alike, so this is the one stable matching; it does not depend on the
  order of tokens, a token never gets an expert twice, and nothing that stays is displaced.
- Weights are the router's scores of what is computed in the end, renormalised only if the model's router does
  (`norm_topk_prob`): over what is computed, or over the top-k that the router wanted, so that what is lost stays lost.
  Tokens that lose nothing keep the very weights that the router gave.

`amoe.policy.capacity_reference` has the same in loops. Shape letters: n tokens, K experts per token, E experts, G
groups that share a capacity (experts or devices), P pairs of a token at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from amoe.policy.matching import FloatArray, first_of_groups, match_best
from amoe.types import BoolArray, Float32Array, Int64Array

Metric = Literal["score", "order", "reverse", "random"]
_ROUNDING = 1e-9  # 1.1 * 400 / 8 is a little more than 55
_ALL_BITS = 2**64 - 1
_MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


@dataclass(frozen=True, slots=True)
class RoutedBatch:
    """What the router wants for the tokens of one micro-batch.

    Attributes:
        topk_ids: [n, K] experts, best first; -1: padding.
        topk_scores: [n, K] float32, softmax over all experts, not renormalised.
        droppable: [n] pairs of this token may be touched. Others count, and stay.
        drop_first: [n] loses before all others do; None: nobody.
        noise: [n, K] in [0, 1) for the metric `random`, see `pair_noise`.
    """

    topk_ids: Int64Array
    topk_scores: Float32Array
    droppable: BoolArray
    drop_first: BoolArray | None = None
    noise: FloatArray | None = None

    @property
    def is_pair(self) -> BoolArray:
        """[n, K]: not padding."""
        return self.topk_ids >= 0


@dataclass(frozen=True, slots=True)
class Selection:
    """The pairs that are computed.

    Attributes:
        expert_ids: [n, P] best first, -1 where there is none. Rows of `touched` [n] differ from the router's.
        scores: [n, P] the router's, 0 where there is no pair.
        lost: [n, K] pairs of the router that are not computed.
        num_new: [n] pairs that the router's top-k did not have.
        num_over: protected pairs (best, or of exact requests) beyond the capacity of their group.
    """

    expert_ids: Int64Array
    scores: Float32Array
    touched: BoolArray
    lost: BoolArray
    num_new: Int64Array
    num_over: int

    @property
    def num_rerouted(self) -> Int64Array:
        """[n] lost pairs in whose place another expert computes."""
        return np.minimum(self.lost.sum(axis=1), self.num_new)

    @property
    def num_dropped(self) -> Int64Array:
        """[n] lost pairs in whose place nothing is computed."""
        return self.lost.sum(axis=1) - self.num_rerouted


def group_capacity(factor: float, num_pairs: int, experts_per_group: FloatArray) -> Int64Array:
    """[G] pairs that each group may take: γ times its even share, rounded up, at least one.

    Args:
        experts_per_group: [G] experts that it holds (of replicas, the shares); ones: every expert is a group.
    """
    even = num_pairs / experts_per_group.sum()
    return np.maximum(1, np.ceil(factor * even * experts_per_group - _ROUNDING)).astype(np.int64)


def expert_capacity(factor: float, num_pairs: int, num_experts: int) -> int:
    """C, in pairs, of each of so many experts."""
    return int(group_capacity(factor, num_pairs, np.ones(num_experts))[0])


def drop(
    batch: RoutedBatch, groups: Int64Array, capacity: Int64Array, *, metric: Metric = "score", keep_best: bool = True
) -> Selection:
    """Token Drop.

    Args:
        groups: [n, K] whose capacity each pair uses: its expert (`topk_ids`), or its device.
        capacity: [G] pairs.
        keep_best: a token's first pair stays even where there is no room.
    """
    lost, over = _overflow(batch, groups, capacity, metric, keep_best)
    return without(batch, lost, over)


def reroute(
    batch: RoutedBatch,
    groups: Int64Array,
    capacity: Int64Array,
    scores: Float32Array,
    group_of_expert: Int64Array,
    *,
    is_there: BoolArray | None = None,
    keep_best: bool = True,
) -> Selection:
    """Token Reroute: what `drop` by score would drop goes to the best expert with room that the token does not have.

    Args:
        scores: [n, E] of all experts.
        group_of_expert: [E] whose capacity a new pair would use.
        is_there: [E] experts to which a pair may go; None: all.
    """
    lost, over = _overflow(batch, groups, capacity, "score", keep_best)
    taken = np.bincount(groups[batch.is_pair & ~lost], minlength=len(capacity))
    wanted = lost.sum(axis=1)
    losers = np.flatnonzero(wanted)
    if len(losers) == 0:
        return without(batch, lost, over)
    bids = scores[losers].astype(np.float64)
    if is_there is not None:
        bids[:, ~is_there] = -np.inf
    held = np.where(batch.is_pair[losers], batch.topk_ids[losers], 0)
    np.put_along_axis(bids, held, -np.inf, axis=1)
    assigned = match_best(bids, wanted[losers], np.maximum(0, capacity - taken), group_of_expert)
    new = np.zeros(scores.shape, np.bool_)
    new[losers] = assigned
    return replaced(batch, lost, new, scores, over)


def expand(
    batch: RoutedBatch,
    capacity: Int64Array,
    scores: Float32Array,
    groups: Int64Array,
    local: BoolArray,
    *,
    at_most_k: bool = True,
    keep_best: bool = True,
) -> Selection:
    """Expanded Drop: every group keeps its best bids; droppable tokens bid for their top-k and for `local` [n, E].

    Args:
        groups: [n, E] whose capacity each bid uses.
        at_most_k: of what a token has got, only its best K pairs are computed.
    """
    routed = _as_mask(batch, batch.is_pair, scores.shape[1])
    protected = _as_mask(batch, batch.is_pair & _protected(batch, keep_best), scores.shape[1])
    rows, experts = np.nonzero(
        routed | (local & batch.droppable[:, None] & np.any(batch.is_pair, axis=1, keepdims=True))
    )
    late = np.zeros(len(rows), np.bool_) if batch.drop_first is None else batch.drop_first[rows]
    kept, over = first_of_groups(
        groups[rows, experts], -scores[rows, experts], late, protected[rows, experts], capacity
    )
    chosen = np.zeros(scores.shape, np.bool_)
    chosen[rows[kept], experts[kept]] = True
    if at_most_k:
        chosen = _best_of_row(chosen, scores, batch.topk_ids.shape[1], protected)
    lost = batch.is_pair & ~np.take_along_axis(chosen, np.maximum(batch.topk_ids, 0), axis=1)
    return replaced(batch, lost, chosen & ~routed, scores, over)


def without(batch: RoutedBatch, lost: BoolArray, over: int = 0) -> Selection:
    """The router's pairs without `lost` [n, K]; `over`: see `Selection.num_over`."""
    stays = batch.is_pair & ~lost
    return Selection(
        expert_ids=np.where(stays, batch.topk_ids, -1),
        scores=np.where(stays, batch.topk_scores, np.float32(0)),
        touched=np.any(lost, axis=1, keepdims=True).ravel(),
        lost=lost,
        num_new=np.zeros(len(lost), np.int64),
        num_over=over,
    )


def replaced(batch: RoutedBatch, lost: BoolArray, new: BoolArray, scores: Float32Array, over: int = 0) -> Selection:
    """The router's pairs without `lost` [n, K] and with `new` [n, E]; touched rows are sorted, best first."""
    touched = np.any(lost, axis=1, keepdims=True).ravel() | np.any(new, axis=1, keepdims=True).ravel()
    rows = np.flatnonzero(touched)
    mask = new[rows]
    stays = batch.is_pair[rows] & ~lost[rows]
    at, column = np.nonzero(stays)
    mask[at, batch.topk_ids[rows[at], column]] = True
    width = max(batch.topk_ids.shape[1], int(mask.sum(axis=1).max(initial=0)))
    ids = np.full((len(touched), width), -1, np.int64)
    values = np.zeros((len(touched), width), np.float32)
    ids[:, : batch.topk_ids.shape[1]] = batch.topk_ids
    values[:, : batch.topk_ids.shape[1]] = np.where(batch.is_pair, batch.topk_scores, np.float32(0))
    best = np.argsort(np.where(mask, -scores[rows], np.inf), axis=1, kind="stable")[:, :width]
    there = np.take_along_axis(mask, best, axis=1)
    ids[rows, : best.shape[1]] = np.where(there, best, -1)
    values[rows, : best.shape[1]] = np.where(there, np.take_along_axis(scores[rows], best, axis=1), np.float32(0))
    return Selection(ids, values, touched, lost, new.sum(axis=1).astype(np.int64), over)


def weigh(
    selection: Selection,
    topk_weights: Float32Array,
    topk_scores: Float32Array,
    *,
    renormalise: bool,
    spread_mass: bool = True,
) -> Float32Array:
    """[n, P] weights of the pairs of a selection; rows that are not touched keep the router's `topk_weights` [n, K].

    Those of touched rows are float32, also where the model's router rounds them to its own type.

    Args:
        topk_scores: [n, K] the router's softmax.
        renormalise: the model's router gives weights that sum to one.
        spread_mass: if so, those of the pairs of a touched row do again; otherwise they keep what they had.
    """
    weights = np.zeros(selection.expert_ids.shape, np.float32)
    weights[:, : topk_weights.shape[1]] = topk_weights
    rows = selection.touched
    scores = selection.scores[rows]
    if renormalise:
        total = (scores if spread_mass else topk_scores[rows]).sum(axis=1, keepdims=True)
        scores = np.divide(scores, total, out=np.zeros_like(scores), where=total > 0)
    weights[rows] = scores
    return weights


def mass_lost(selection: Selection, topk_scores: Float32Array) -> FloatArray:
    """[n] part of a token's gate mass (sum of its top-k scores) that its pairs no longer have, in [0, 1]."""
    before, after = topk_scores.sum(axis=1), selection.scores.sum(axis=1)
    lost = np.divide(before - after, before, out=np.zeros_like(before), where=before > 0)
    return np.where(selection.touched, np.clip(lost, 0.0, 1.0), 0.0)


def pair_noise(seed: int, tokens: npt.NDArray[np.uint64], topk_ids: Int64Array) -> FloatArray:
    """[n, K] in [0, 1), a function of (seed, token, expert) alone: whoever else is in the batch changes nothing.

    Args:
        tokens: [n] names of the tokens (request, position and layer in one number).
    """
    with np.errstate(over="ignore"):
        mixed = (tokens[:, None] + np.uint64(seed & _ALL_BITS)) * _MIX[0] + topk_ids.astype(np.uint64)
        for shift, factor in ((30, _MIX[1]), (27, _MIX[2])):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * factor
        mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(11)).astype(np.float64) / 2**53


# ---- shared


def _protected(batch: RoutedBatch, keep_best: bool) -> BoolArray:
    """[n, K] pairs that stay whatever the capacity."""
    protected = np.repeat(~batch.droppable[:, None], batch.topk_ids.shape[1], axis=1)
    if keep_best:
        protected[:, 0] = True
    return protected


def _overflow(
    batch: RoutedBatch, groups: Int64Array, capacity: Int64Array, metric: Metric, keep_best: bool
) -> tuple[BoolArray, int]:
    """([n, K] pairs for which there is no room, protected pairs that are kept without room)."""
    is_pair = batch.is_pair
    rows = np.nonzero(is_pair)[0]
    late = None if batch.drop_first is None else batch.drop_first[rows]
    keys = _keys(batch, metric)[is_pair]
    kept, over = first_of_groups(groups[is_pair], keys, late, _protected(batch, keep_best)[is_pair], capacity)
    lost = np.zeros(is_pair.shape, np.bool_)
    lost[is_pair] = ~kept
    return lost, over


def _keys(batch: RoutedBatch, metric: Metric) -> FloatArray:
    """[n, K] the pair with the smallest key stays longest."""
    if metric == "score":
        return -batch.topk_scores
    if metric == "random":
        assert batch.noise is not None, "the metric random needs noise"
        return batch.noise
    order = np.repeat(np.arange(len(batch.topk_ids), dtype=np.float64)[:, None], batch.topk_ids.shape[1], axis=1)
    return order if metric == "order" else -order


def _as_mask(batch: RoutedBatch, pairs: BoolArray, num_experts: int) -> BoolArray:
    """[n, E] of pairs [n, K]."""
    mask = np.zeros((len(pairs), num_experts), np.bool_)
    rows, columns = np.nonzero(pairs)
    mask[rows, batch.topk_ids[rows, columns]] = True
    return mask


def _best_of_row(chosen: BoolArray, scores: Float32Array, most: int, protected: BoolArray) -> BoolArray:
    """Of each row of `chosen` [n, E] the protected pairs, then the best, `most` in all."""
    value = np.where(chosen, np.where(protected, np.inf, scores), -np.inf)
    ranks = np.argsort(np.argsort(-value, axis=1, kind="stable"), axis=1, kind="stable")
    return chosen & (ranks < most)

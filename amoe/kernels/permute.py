"""Group the (token, expert) pairs of a batch by expert: on the host, because the ids come from the wire as numpy.

Shape letters: n tokens, K experts per token, P pairs at this worker, E experts at this worker.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


@dataclass(slots=True)
class PairPlan:
    """Where the pairs of a batch stand once they are sorted by expert.

    There are two orders. *Sorted* order groups pairs by local expert, tokens ascending inside an expert: the order in
    which the matrices are multiplied. *Token* order runs over tokens and, inside a token, over k: the order in
    which a token's pairs are summed, whatever else is in the batch.

    Attributes:
        num_tokens: n; tokens without a pair here are allowed, their sum is zero.
        token_rows: [P] token of each pair, in sorted order.
        experts: local experts that have pairs, ascending.
        counts: pairs of each of them, same length; their sum is P.
        pair_positions: [P] position in sorted order of each pair, in token order.
        pair_weights: [P] weights, in token order.
        token_offsets: [n] index in token order of each token's first pair.
    """

    num_tokens: int
    token_rows: Int64Array
    experts: list[int]
    counts: list[int]
    pair_positions: Int64Array
    pair_weights: Float32Array
    token_offsets: Int64Array

    @property
    def num_pairs(self) -> int:
        return len(self.token_rows)

    @property
    def offsets(self) -> list[int]:
        """Where each expert's pairs begin in sorted order, and P at the end: one more than `experts`."""
        return [0, *np.cumsum(self.counts, dtype=np.int64).tolist()]

    def padded(self, num_experts: int, rows: int) -> tuple[Int64Array, Int64Array]:
        """The same pairs with `rows` places for each of `num_experts` local experts.

        Returns:
            token_rows [num_experts * rows], token 0 where a place is empty; and pair_positions [P] among those places.
        """
        counts = np.array(self.counts)
        rank = np.arange(self.num_pairs) - np.repeat(np.cumsum(counts) - counts, counts)  # within its expert
        places = np.repeat(np.array(self.experts) * rows, counts) + rank
        token_rows = np.zeros(num_experts * rows, np.int64)
        token_rows[places] = self.token_rows
        return token_rows, places[self.pair_positions]


def plan_pairs(
    expert_ids: npt.NDArray[np.int16] | Int64Array, weights: Float32Array, local_index: Int64Array
) -> PairPlan:
    """Sort the pairs that belong to this worker by its experts.

    Args:
        expert_ids: [n, K] global expert ids, -1 for absent. Ids of experts that are not here are skipped too.
        weights: [n, K] weights of the pairs.
        local_index: [num_experts] local index of each global expert, -1 if it is not here.
    """
    num_tokens, top_k = expert_ids.shape
    flat = expert_ids.ravel()
    local = local_index[flat]  # an absent id, -1, reads the last entry: masked on the next line
    here = np.flatnonzero((flat >= 0) & (local >= 0))
    num_pairs = len(here)
    if num_pairs != flat.size:
        local = local[here]
        pair_weights = weights.ravel()[here]
    else:
        pair_weights = weights.ravel()
    rows = here // top_k
    order = np.argsort(local, kind="stable")
    positions = np.empty(num_pairs, np.int64)
    positions[order] = np.arange(num_pairs)
    pairs_per_expert = np.bincount(local, minlength=1)
    present = np.flatnonzero(pairs_per_expert)
    return PairPlan(
        num_tokens=num_tokens,
        token_rows=rows[order],
        experts=present.tolist(),
        counts=pairs_per_expert[present].tolist(),
        pair_positions=positions,
        pair_weights=np.array(pair_weights, np.float32),  # a copy: the wire's buffer is read-only and will be reused
        token_offsets=np.searchsorted(rows, np.arange(num_tokens)),
    )


def plan_pairs_reference(
    expert_ids: npt.NDArray[np.int16] | Int64Array, weights: Float32Array, local_index: Int64Array
) -> PairPlan:
    """`plan_pairs` written as loops: its oracle."""
    pairs: list[tuple[int, int, float]] = []  # (local expert, token, weight), in token order
    token_offsets = []
    for token, ids in enumerate(expert_ids.tolist()):
        token_offsets.append(len(pairs))
        for k, expert in enumerate(ids):
            if expert >= 0 and local_index[expert] >= 0:
                pairs.append((int(local_index[expert]), token, float(weights[token, k])))
    order = sorted(range(len(pairs)), key=lambda index: pairs[index][0])
    experts = sorted({expert for expert, _, _ in pairs})
    return PairPlan(
        num_tokens=len(expert_ids),
        token_rows=np.array([pairs[index][1] for index in order], np.int64),
        experts=experts,
        counts=[sum(pair[0] == expert for pair in pairs) for expert in experts],
        pair_positions=np.array([order.index(index) for index in range(len(pairs))], np.int64),
        pair_weights=np.array([weight for _, _, weight in pairs], np.float32),
        token_offsets=np.array(token_offsets, np.int64),
    )

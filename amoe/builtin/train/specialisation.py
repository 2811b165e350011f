"""How unequal the experts' loads are, and how much an expert's identity says about the token.

Legend: N tokens, L layers, E experts, k experts per token, C token classes. Each figure has its chance level beside it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int16]
Floats = NDArray[np.float64]


def load_shares(topk_ids: Ids, num_experts: int) -> Floats:
    """Share of the pairs of each layer that each expert gets: `[L, N, k] -> [L, E]`."""
    counts = np.stack([np.bincount(layer.reshape(-1), minlength=num_experts) for layer in topk_ids])
    return counts / counts.sum(axis=1, keepdims=True)


def max_over_mean(shares: Floats) -> Floats:
    """Load of the hottest expert over the mean load: `[..., E] -> [...]`."""
    result: Floats = shares.max(axis=-1) / shares.mean(axis=-1)
    return result


def uniform_floor(num_tokens: int, k: int, num_experts: int, trials: int = 200, seed: int = 0) -> float:
    """Mean of max/mean where every token picks k distinct experts at random: what a sample shows without skew."""
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(trials):
        ids = np.argpartition(generator.random((num_tokens, num_experts)), k, axis=1)[:, :k]
        values.append(max_over_mean(np.bincount(ids.reshape(-1), minlength=num_experts).astype(float)))
    return float(np.mean(values))


def batch_skew(topk_ids: Ids, num_experts: int, batch: int, trials: int = 200, seed: int = 0) -> Floats:
    """Mean max/mean over batches of `batch` tokens drawn at random (a decode step): `[L, N, k] -> [L]`."""
    generator = np.random.default_rng(seed)
    total = np.zeros(topk_ids.shape[0])
    for _ in range(trials):
        chosen = generator.choice(topk_ids.shape[1], batch, replace=False)
        total += max_over_mean(load_shares(topk_ids[:, chosen], num_experts))
    return total / trials


def normalised_mutual_information(labels: NDArray[np.integer], experts: Ids) -> float:
    """Mutual information of two labelings `[N]` over their mean entropy: 0 independent, 1 the same partition."""
    table = np.zeros((int(labels.max()) + 1, int(experts.max()) + 1))
    np.add.at(table, (labels, experts), 1)
    joint = table / table.sum()
    rows, columns = joint.sum(1), joint.sum(0)
    present = joint > 0
    information = (joint[present] * np.log(joint[present] / np.outer(rows, columns)[present])).sum()
    return float(information / ((_entropy(rows) + _entropy(columns)) / 2))


def _entropy(shares: Floats) -> float:
    present = shares[shares > 0]
    return float(-(present * np.log(present)).sum())


def nmi_by_layer(topk_ids: Ids, labels: NDArray[np.integer], seed: int = 0) -> tuple[Floats, Floats]:
    """NMI of the first-choice expert with `labels [N]` per layer, and with the labels permuted: `[L], [L]`."""
    permuted = np.random.default_rng(seed).permutation(labels)
    first = topk_ids[:, :, 0]
    real = np.array([normalised_mutual_information(labels, layer) for layer in first])
    return real, np.array([normalised_mutual_information(permuted, layer) for layer in first])


def hot_set_jaccard(left: Floats, right: Floats, size: int) -> Floats:
    """Overlap of the `size` hottest experts of two loads `[L, E]`: intersection over union, `[L]`."""
    result = []
    for a, b in zip(left, right, strict=True):
        hot_a, hot_b = set(np.argsort(-a)[:size].tolist()), set(np.argsort(-b)[:size].tolist())
        result.append(len(hot_a & hot_b) / len(hot_a | hot_b))
    return np.array(result)


def total_variation(left: Floats, right: Floats) -> Floats:
    """Half the summed difference of two loads `[L, E]`: share of the pairs that would have to move, `[L]`."""
    result: Floats = np.abs(left - right).sum(axis=-1) / 2
    return result


def class_shares(topk_ids: Ids, labels: NDArray[np.integer], num_classes: int, num_experts: int) -> Floats:
    """Load of each expert by token class, `[L, C, E]`, each row summing to 1 (0 for an absent class)."""
    result = np.zeros((topk_ids.shape[0], num_classes, num_experts))
    for label in range(num_classes):
        chosen = topk_ids[:, labels == label]
        if chosen.shape[1]:
            result[:, label] = load_shares(chosen, num_experts)
    return result

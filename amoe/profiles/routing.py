"""Where tokens go when there is no router: distributions of experts, as skewed as measured ones.

A routing model draws `topk_ids` [n, K] for tokens at a layer: K different experts by Gumbel top-k over the layer's
weights, which is what sampling without replacement in proportion to the weights means.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from amoe.errors import ConfigError
from amoe.profiles.models import ModelSizes
from amoe.types import Float32Array

FloatArray = npt.NDArray[np.float64]
_POPULARITY_TOKENS = 4096

# Largest expert load over the mean, as published: see benchmarks/README or the study's report for the sources.
PUBLISHED_IMBALANCE = {
    "deepseek-r1-translation": 11.95,
    "qwen3-30b-gsm8k": 9.40,
    "qwen3-30b-mbpp": 8.39,
    "olmoe-chat": 3.1,
    "olmoe-code": 6.7,
    "gpt-oss-120b-random": 10.6,
}


class RoutingModel(Protocol):
    """Draws experts for tokens."""

    def draw(self, rng: np.random.Generator, layer: int, num_tokens: int, now: float = 0.0) -> npt.NDArray[np.int64]:
        """[num_tokens, K] different experts for each token, most weighty first, at time `now` in seconds."""
        ...

    def popularity(self, now: float = 0.0) -> FloatArray:
        """[L, E] expected share of the pairs of each layer; rows sum to one (rows of dense layers too)."""
        ...


def scores_of(rng: np.random.Generator, topk_ids: npt.NDArray[np.int64], popularity: FloatArray) -> Float32Array:
    """[n, E] softmax scores of a router that would choose `topk_ids` [n, K]: best first, all others below.

    Args:
        popularity: [E] of the experts: the others' scores follow it.
    """
    n, top_k = topk_ids.shape
    logits = rng.gumbel(size=(n, len(popularity))) + np.log(np.maximum(popularity, 1e-9))
    best_first = -np.sort(-logits, axis=1)
    ranks = logits.copy()
    np.put_along_axis(ranks, topk_ids, np.inf, axis=1)
    order = np.argsort(-ranks, axis=1, kind="stable")
    order[:, :top_k] = topk_ids
    scores = np.empty(logits.shape)
    np.put_along_axis(scores, order, np.exp(best_first - best_first[:, :1]), axis=1)
    return (scores / scores.sum(axis=1, keepdims=True)).astype(np.float32)


class WeightedRouting:
    """Stationary routing by weights.

    Args:
        weights: [L, E] positive.
        top_k: K.
    """

    def __init__(self, weights: FloatArray, top_k: int) -> None:
        if not (weights > 0).all() or not np.isfinite(weights).all():
            raise ConfigError("routing weights must be positive and finite")
        if not 1 <= top_k <= weights.shape[1]:
            raise ConfigError(f"top_k must be between 1 and {weights.shape[1]}, not {top_k}")
        self.weights = weights / weights.sum(axis=1, keepdims=True)
        self.top_k = top_k
        self._log_weights = np.log(self.weights)
        self._popularity: FloatArray | None = None

    def draw(self, rng: np.random.Generator, layer: int, num_tokens: int, now: float = 0.0) -> npt.NDArray[np.int64]:
        """See `RoutingModel`."""
        if self.top_k == 1:
            bounds = np.cumsum(self.weights[layer])
            return np.minimum(np.searchsorted(bounds, rng.random(num_tokens)), len(bounds) - 1)[:, None]
        keys = self._log_weights[layer] + rng.gumbel(size=(num_tokens, self.weights.shape[1]))
        best = np.argpartition(-keys, self.top_k - 1, axis=1)[:, : self.top_k]
        order = np.argsort(-np.take_along_axis(keys, best, axis=1), axis=1)
        return np.take_along_axis(best, order, axis=1)

    def popularity(self, now: float = 0.0) -> FloatArray:
        """Exact where K = 1 or K = E, from a fixed sample of 4,096 tokens otherwise."""
        if self._popularity is None:
            num_experts = self.weights.shape[1]
            if self.top_k == 1:
                self._popularity = self.weights
            elif self.top_k == num_experts:
                self._popularity = np.full(self.weights.shape, 1 / num_experts)
            else:
                self._popularity = np.stack([self._sampled_popularity(layer) for layer in range(len(self.weights))])
        return self._popularity

    def _sampled_popularity(self, layer: int) -> FloatArray:
        """[E] of a layer: the mean chance of an expert to be chosen, given when all the others come up.

        Gumbel top-k is a race: expert e comes up after an exponential time of rate w_e, and the first K are chosen. So
        e is chosen if it comes up before the K-th of the others, at t: with probability 1 - exp(-w_e·t). To average
        that is far more exact than to count who was chosen: equal weights must not look uneven.
        """
        weights = self.weights[layer]
        times = np.random.default_rng(layer).exponential(size=(_POPULARITY_TOKENS, len(weights))) / weights
        first = np.partition(times, (self.top_k - 1, self.top_k), axis=1)
        last, following = first[:, self.top_k - 1, None], first[:, self.top_k, None]
        chances = -np.expm1(-weights * np.where(times <= last, following, last))
        popularity: FloatArray = chances.mean(axis=0)
        return popularity / popularity.sum()


def log_normal_routing(sizes: ModelSizes, sigma: float, seed: int, *, correlated: bool = False) -> WeightedRouting:
    """Log-normal expert weights: σ = 0 uniform, 0.5 moderate, 1.25 as hot as measured in production.

    Args:
        correlated: all layers have the same weights, so that the same devices are hot everywhere.

    Raises:
        ConfigError: σ is negative.
    """
    if sigma < 0:
        raise ConfigError(f"sigma must be at least 0, not {sigma}")
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((sizes.num_layers, sizes.num_experts))
    if correlated:
        normal = np.tile(normal[:1], (sizes.num_layers, 1))
    return WeightedRouting(np.exp(sigma * normal), sizes.top_k)


def published_routing(sizes: ModelSizes, name: str, seed: int) -> WeightedRouting:
    """Log-normal routing whose busiest expert has, on average over the layers, the published load over the mean.

    Raises:
        ConfigError: there is no such figure, or the sizes cannot have it (the most possible is E / K).
    """
    if name not in PUBLISHED_IMBALANCE:
        raise ConfigError(f"no published imbalance {name!r}; known: {', '.join(PUBLISHED_IMBALANCE)}")
    target = PUBLISHED_IMBALANCE[name]
    if target >= sizes.num_experts / sizes.top_k:
        raise ConfigError(f"{sizes.name} cannot have a load of {target} times the mean: E / K is the most")
    low, high = 0.0, 8.0
    for _ in range(14):
        middle = (low + high) / 2
        popularity = log_normal_routing(sizes, middle, seed).popularity()
        imbalance = float((popularity.max(axis=1) * sizes.num_experts).mean())
        low, high = (middle, high) if imbalance < target else (low, middle)
    return log_normal_routing(sizes, low, seed)


class DriftingRouting:
    """Domains that follow each other: each holds for `period_s`, then the next, round and round."""

    def __init__(self, domains: Sequence[RoutingModel], period_s: float) -> None:
        if not domains or period_s <= 0:
            raise ConfigError("drifting routing needs at least one domain and a period greater than 0 seconds")
        self._domains = tuple(domains)
        self._period_s = period_s

    def _at(self, now: float) -> RoutingModel:
        return self._domains[int(now / self._period_s) % len(self._domains)]

    def draw(self, rng: np.random.Generator, layer: int, num_tokens: int, now: float = 0.0) -> npt.NDArray[np.int64]:
        """See `RoutingModel`."""
        return self._at(now).draw(rng, layer, num_tokens, now)

    def popularity(self, now: float = 0.0) -> FloatArray:
        """Of the domain that holds at `now`."""
        return self._at(now).popularity(now)


class RecordedRouting:
    """Tokens take the experts that recorded tokens took at the layer: one of them at random, another at each layer.

    Args:
        topk_ids: [T, L, K] of T recorded tokens.
        num_experts: E.
    """

    def __init__(self, topk_ids: npt.NDArray[np.int64], num_experts: int) -> None:
        if topk_ids.ndim != 3 or len(topk_ids) == 0 or topk_ids.min() < 0 or topk_ids.max() >= num_experts:
            raise ConfigError(f"recorded routing must be [tokens, layers, top_k] with ids below {num_experts}")
        self._topk_ids = topk_ids.astype(np.int64)
        counts = [np.bincount(topk_ids[:, layer].ravel(), minlength=num_experts) for layer in range(topk_ids.shape[1])]
        self._popularity = np.stack(counts) / np.stack(counts).sum(axis=1, keepdims=True)

    def draw(self, rng: np.random.Generator, layer: int, num_tokens: int, now: float = 0.0) -> npt.NDArray[np.int64]:
        """See `RoutingModel`."""
        return self._topk_ids[rng.integers(len(self._topk_ids), size=num_tokens), layer]

    def popularity(self, now: float = 0.0) -> FloatArray:
        """Of the record."""
        return self._popularity

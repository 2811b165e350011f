"""A `CapacityConfig` applied between router and experts, as a home of the engine does, and the tally of what it did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from amoe.config import CapacityConfig
from amoe.models.config import ModelConfig
from amoe.models.outputs import AttentionOutput
from amoe.policy import capacity as policy
from amoe.policy.capacity import RoutedBatch, Selection
from amoe.types import BoolArray, Float32Array, Int64Array
from benchmarks.capacity_quality.forward import Rows

Locality = Literal["own", "source", "all"]
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How requests meet.

    Attributes:
        prompt, continuation: tokens of a window.
        prefill, decode: tokens of a micro-batch: whole prompts, or chunks of one, one after the other; and one token
            each of as many sequences.
        devices: that experts are divided on, contiguously.
        local: what `expanded` may add. `own`: the micro-batch is that of all devices together, an even part of its
            tokens living on each, and a token's local experts are those of its device. `source`: all tokens of a
            micro-batch live on one device (micro-batches take turns), as the paper's capacity per source has it and as
            the engine's homes do. `all`: every expert is local, as the paper's published code has it by default.
    """

    prompt: int = 128
    continuation: int = 64
    prefill: int = 512
    decode: int = 64
    devices: int = 4
    local: Locality = "own"
    spread_mass: bool = True


@dataclass
class Tally:
    """Sums over tokens and layers (`tokens`: as many), and over micro-batches and layers (`batches`).

    Attributes:
        routed, computed: pairs that the router wanted, and that were computed.
        dropped, rerouted: pairs of the router that nothing, or another expert, computes for.
        mass_lost: part of the tokens' gate mass.
        empty: tokens without any pair.
        over: pairs computed beyond the cap, because they are a token's best.
        peak, device_peak: pairs of the most loaded expert and device over the even share of what the router wanted.
    """

    tokens: float = 0
    routed: float = 0
    computed: float = 0
    dropped: float = 0
    rerouted: float = 0
    mass_lost: float = 0
    empty: float = 0
    over: float = 0
    batches: float = 0
    peak: float = 0
    device_peak: float = 0

    def figures(self) -> dict[str, float]:
        """Shares and means, as a row has them."""
        return {
            "pairs_per_token": self.computed / self.tokens,
            "dropped": self.dropped / self.routed,
            "rerouted": self.rerouted / self.routed,
            "mass_lost": self.mass_lost / self.tokens,
            "empty": self.empty / self.tokens,
            "over": self.over / self.routed,
            "peak": self.peak / self.batches,
            "device_peak": self.device_peak / self.batches,
        }


class Capping:
    """Decides the pairs of micro-batches, and counts."""

    def __init__(self, model: ModelConfig, capacity: CapacityConfig, batching: Batching, *, active: bool) -> None:
        self._model = model
        self._capacity = capacity
        self._batching = batching
        self._active = active and capacity.factor is not None
        self._device_of_expert = _even(model.num_experts, batching.devices)
        self.tally = Tally()

    def __call__(self, layer: int, rows: Rows, out: AttentionOutput) -> tuple[Int64Array, Float32Array]:
        """What `Forward.step` computes."""
        assert out.topk_ids is not None and out.topk_weights is not None and out.scores is not None
        topk_ids, scores = out.topk_ids.numpy(), out.scores.numpy()
        noise = None
        if self._capacity.metric == "random":
            names = (rows.sequences << 32) ^ (rows.positions << 10) ^ layer
            noise = policy.pair_noise(_SEED, names.astype(np.uint64), topk_ids)
        topk_scores = np.take_along_axis(scores, topk_ids, axis=1)
        batch = RoutedBatch(topk_ids, topk_scores, np.ones(len(topk_ids), np.bool_), noise=noise)
        nothing = np.zeros(batch.topk_ids.shape, np.bool_)
        selection = self._select(batch, scores, rows) if self._active else policy.without(batch, nothing)
        self._count(batch, selection)
        weights = policy.weigh(
            selection,
            out.topk_weights.numpy(),
            topk_scores,
            renormalise=self._model.norm_topk_prob,
            spread_mass=self._batching.spread_mass,
        )
        return selection.expert_ids, weights

    def _select(self, batch: RoutedBatch, scores: Float32Array, rows: Rows) -> Selection:
        config, num_experts = self._capacity, self._model.num_experts
        assert config.factor is not None
        if config.scope == "expert":
            group_of_expert = np.arange(num_experts)
            even = policy.expert_capacity(config.factor, batch.topk_ids.size, num_experts)
            capacity = np.full(num_experts, even)
        else:
            group_of_expert = self._device_of_expert
            held = np.bincount(group_of_expert, minlength=self._batching.devices).astype(np.float64)
            capacity = policy.group_capacity(config.factor, batch.topk_ids.size, held)
        groups, keep = group_of_expert[batch.topk_ids], config.keep_best
        if config.mode == "drop":
            return policy.drop(batch, groups, capacity, metric=config.metric, keep_best=keep)
        if config.mode == "reroute":
            return policy.reroute(batch, groups, capacity, scores, group_of_expert, keep_best=keep)
        local, most = self._local(rows), not config.exceed_top_k
        bids = np.broadcast_to(group_of_expert, scores.shape)
        return policy.expand(batch, capacity, scores, bids, local, at_most_k=most, keep_best=keep)

    def _local(self, rows: Rows) -> BoolArray:
        """[n, E] experts on the device that a token lives on."""
        count, devices = len(rows.sequences), self._batching.devices
        if self._batching.local == "all":
            return np.ones((count, len(self._device_of_expert)), np.bool_)
        home = np.full(count, rows.number % devices) if self._batching.local == "source" else _even(count, devices)
        return home[:, None] == self._device_of_expert

    def _count(self, batch: RoutedBatch, selection: Selection) -> None:
        tally, pairs = self.tally, selection.expert_ids >= 0
        loads = np.bincount(selection.expert_ids[pairs], minlength=self._model.num_experts)
        device_loads = np.bincount(self._device_of_expert, weights=loads, minlength=self._batching.devices)
        tally.tokens += len(pairs)
        tally.routed += batch.topk_ids.size
        tally.computed += int(loads.sum())
        tally.dropped += int(selection.num_dropped.sum())
        tally.rerouted += int(selection.num_rerouted.sum())
        tally.mass_lost += float(policy.mass_lost(selection, batch.topk_scores).sum())
        tally.empty += int((~pairs.any(axis=1)).sum())
        tally.over += selection.num_over
        tally.batches += 1
        tally.peak += float(loads.max()) * len(loads) / batch.topk_ids.size
        tally.device_peak += float(device_loads.max()) * len(device_loads) / batch.topk_ids.size


def _even(count: int, parts: int) -> Int64Array:
    """[count] which of `parts` contiguous, even parts each is in."""
    return np.arange(count) * parts // count

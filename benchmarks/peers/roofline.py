"""What the machine would allow: the bytes and operations of a step against measured bandwidth and measured peak."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from amoe.models.config import ModelConfig

_PEAK_SIZE = 2048
_PEAK_REPEATS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """`bandwidth`: bytes per second that are read; `peak`: bf16 operations per second."""

    bandwidth: float
    peak: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """A step of all layers and the head. `weight_bytes`: read once; `kv_bytes`: of all sequences' contexts."""

    weight_bytes: float
    kv_bytes: float
    operations: float

    def seconds(self, machine: Machine) -> float:
        """The least that it can take: reading and computing overlap perfectly."""
        return max((self.weight_bytes + self.kv_bytes) / machine.bandwidth, self.operations / machine.peak)


def distinct_experts(shares: npt.ArrayLike, top_k: int, num_tokens: int) -> float:
    """Experts of a layer that get any of `num_tokens` tokens, expected, on the mean over the layers.

    Args:
        shares: [num_layers, num_experts] of each layer's pairs. Tokens count as independent.
    """
    chosen = np.clip(np.asarray(shares, np.float64) * top_k, 0.0, 1.0)  # by one token
    return float((1.0 - (1.0 - chosen) ** num_tokens).sum(axis=1).mean())


def uniform_shares(config: ModelConfig) -> list[list[float]]:
    """[1][num_experts]: all experts alike."""
    return [[1.0 / config.num_experts for _ in range(config.num_experts)]]


def step_cost(
    config: ModelConfig,
    *,
    num_tokens: int,
    context: float,
    shares: Sequence[Sequence[float]],
    num_logits: int,
    is_decode: bool = True,
) -> StepCost:
    """Of a step in 16-bit weights and cache.

    Args:
        num_tokens: in the step.
        context: tokens that each of them attends to, on the mean.
        shares: see `distinct_experts`.
        num_logits: tokens that go through the head.
        is_decode: every token reads the keys and values of a context of its own; a prompt's tokens share theirs.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    kv_heads = config.num_key_value_heads * config.head_dim
    attention = hidden * (2 * heads + 2 * kv_heads) + hidden * config.num_experts
    expert = 3 * hidden * config.moe_intermediate_size
    head = hidden * config.vocab_size
    distinct = distinct_experts(shares, config.top_k, num_tokens)
    weights = config.num_layers * (attention + distinct * expert) + head
    cached = num_tokens * context if is_decode else 0.0
    per_token = config.num_layers * (attention + config.top_k * expert + 2 * context * heads)
    return StepCost(
        weight_bytes=2.0 * weights,
        kv_bytes=2.0 * config.num_layers * 2 * kv_heads * cached,
        operations=2.0 * (num_tokens * per_token + num_logits * head),
    )


def measured_peak(num_threads: int) -> float:
    """bf16 operations per second of torch's matrix product, the best of a few."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        left, right = (torch.randn(_PEAK_SIZE, _PEAK_SIZE).bfloat16() for _ in range(2))
        best = 0.0
        for _ in range(_PEAK_REPEATS):
            start = time.perf_counter()
            torch.mm(left, right)
            best = max(best, 2.0 * _PEAK_SIZE**3 / (time.perf_counter() - start))
    finally:
        torch.set_num_threads(before)
    return best

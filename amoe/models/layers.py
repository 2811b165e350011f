"""Layers that all architectures share, as functions over plain tensors.

Shape letters: n tokens, H hidden size, I intermediate size, D head size, K experts per token, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from amoe.models.config import ModelConfig, RopeConfig


@dataclass(slots=True)
class MlpWeights:
    """A gated MLP: gate_up [2I, H] (gate rows, then up rows), down [H, I]."""

    gate_up: torch.Tensor
    down: torch.Tensor


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension, computed in float32. Returns x's shape and dtype."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def gated_mlp(x: torch.Tensor, weights: MlpWeights) -> torch.Tensor:
    """[n, H] to [n, H]."""
    gate, up = F.linear(x, weights.gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate).mul_(up), weights.down)


def route(
    x: torch.Tensor, router: torch.Tensor, config: ModelConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The experts of each token: softmax over all experts in float32, then the best k.

    Args:
        x: [n, H] MoE inputs.
        router: [E, H].

    Returns:
        ids [n, K] int64, best first, weights [n, K] float32, and the softmax [n, E] float32 itself.
    """
    probabilities = torch.softmax(F.linear(x, router), dim=-1, dtype=torch.float32)
    weights, ids = torch.topk(probabilities, config.top_k, dim=-1)
    if config.norm_topk_prob:
        weights /= weights.sum(dim=-1, keepdim=True)
    if config.round_topk_weights:
        weights = weights.to(x.dtype).float()
    return ids, weights, probabilities


def rope_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """[D / 2] float32: radians per position of each pair of dimensions."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    wavelengths = rope.theta**exponents  # over 2 pi
    frequencies = 1.0 / wavelengths
    if rope.type == "linear":
        return frequencies / rope.factor
    if rope.type == "llama3":
        # Long waves are stretched, short ones kept, those between blended by how often they turn in the old context.
        turns = rope.original_max_position * frequencies / (2 * math.pi)
        kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        kept = kept.clamp(0, 1)
        return frequencies * kept + frequencies / rope.factor * (1 - kept)
    if rope.type == "yarn":
        low, high = (_yarn_bound(rope, turns, head_dim) for turns in (rope.beta_fast, rope.beta_slow))
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001
        stretched = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
        return frequencies / rope.factor * stretched + frequencies * (1 - stretched)
    return frequencies


def _yarn_bound(rope: RopeConfig, turns: float, head_dim: int) -> float:
    """The dimension whose wave turns `turns` times in the original context."""
    return head_dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))


def rope_table(config: ModelConfig, max_len: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[max_len, 2, D]: for each position (cos, cos) and (-sin, sin), see `apply_rope`.

    A layer reads its tokens' rows in one gather; tokens of one batch stand at any position.
    """
    positions = torch.arange(max_len, dtype=torch.float32)
    angles = positions.unsqueeze(1) * rope_frequencies(config.rope, config.head_dim)
    cos, sin = angles.cos() * config.rope.attention_factor, angles.sin() * config.rope.attention_factor
    table = torch.stack((torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)), dim=1)
    return table.to(device=device, dtype=dtype)


def apply_rope(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [n, heads, D] by rows [n, 2, D] of the table; dimension d turns with d + D/2."""
    cos, sin = cos_sin[:, None, 0], cos_sin[:, None, 1]
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)

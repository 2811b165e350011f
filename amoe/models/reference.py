"""The slow dense oracle: a plain forward pass over a whole sequence, without cache, batch or kernel.

It shares the loaded weights with `Model` and nothing else: every formula is written out again, in float32. Tests hold
the blocks, the engine and transformers against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import torch

from amoe.models.config import ModelConfig
from amoe.models.layers import MlpWeights, rope_frequencies
from amoe.models.model import AttentionWeights, ExpertWeights, Model


def _norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    normalised = x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps)
    return normalised if weight is None else normalised * weight.float()


def _mlp(x: torch.Tensor, weights: MlpWeights) -> torch.Tensor:
    gate, up = (x @ weights.gate_up.float().T).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up) @ weights.down.float().T


def _rotate(x: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """x [T, heads, D] at positions 0 .. T - 1."""
    half = config.head_dim // 2
    angles = torch.arange(len(x)).unsqueeze(1).float() * rope_frequencies(config.rope, config.head_dim)
    cos, sin = (f(angles).unsqueeze(1) * config.rope.attention_factor for f in (torch.cos, torch.sin))
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _attend(x: torch.Tensor, weights: AttentionWeights, config: ModelConfig) -> torch.Tensor:
    """Causal self-attention of a whole sequence x [T, H], before the residual: [T, H]."""
    length, eps = len(x), config.rms_norm_eps
    projected = x @ weights.qkv.float().T
    if weights.qkv_bias is not None:
        projected = projected + weights.qkv_bias.float()
    q, k, v = projected.split([config.q_size, config.kv_size, config.kv_size], dim=-1)
    if config.qk_norm == "full":
        q, k = _norm(q, weights.q_norm, eps), _norm(k, weights.k_norm, eps)
    q, k, v = (t.view(length, -1, config.head_dim) for t in (q, k, v))
    if config.qk_norm == "head":
        q, k = _norm(q, weights.q_norm, eps), _norm(k, weights.k_norm, eps)
    if config.clip_qkv is not None:
        q, k, v = (t.clamp(-config.clip_qkv, config.clip_qkv) for t in (q, k, v))
    q, k = _rotate(q, config), _rotate(k, config)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    group = config.num_attention_heads // config.num_key_value_heads
    heads = []
    for head in range(config.num_attention_heads):
        scores = q[:, head] @ k[:, head // group].T / math.sqrt(config.head_dim)
        heads.append(torch.softmax(scores.masked_fill(future, -math.inf), dim=-1) @ v[:, head // group])
    return torch.cat(heads, dim=-1) @ weights.out.float().T


def _moe(x: torch.Tensor, router: torch.Tensor, experts: ExpertWeights, config: ModelConfig) -> torch.Tensor:
    """Routed experts of x [T, H], token by token: [T, H]."""
    out = torch.zeros_like(x)
    for row, token in enumerate(x):
        weights, ids = torch.softmax(router.float() @ token, dim=-1).topk(config.top_k)
        if config.norm_topk_prob:
            weights = weights / weights.sum()
        for weight, expert in zip(weights, ids.tolist(), strict=True):
            local = experts.ids.index(expert)
            out[row] += weight * _mlp(token, MlpWeights(experts.w13[local], experts.w2[local]))
    return out


def forward(
    model: Model, token_ids: Sequence[int], on_experts: Callable[[int, torch.Tensor], None] = lambda layer, x: None
) -> torch.Tensor:
    """Logits [T, V] in float32 of a sequence of T tokens. `model` holds all blocks and lives on the CPU.

    Args:
        on_experts: told, for each MoE layer, its number and what enters its router, [T, H].
    """
    config, head = model.config, model.weights.head
    assert head is not None
    residual = head.embedding[torch.tensor(list(token_ids))].float()
    for layer, weights in enumerate(model.weights.attention):
        residual = residual + _attend(_norm(residual, weights.input_norm, config.rms_norm_eps), weights, config)
        x = _norm(residual, weights.post_norm, config.rms_norm_eps)
        if weights.mlp is not None:
            residual = residual + _mlp(x, weights.mlp)
            continue
        assert weights.router is not None
        on_experts(layer, x)
        residual = residual + _moe(x, weights.router, model.weights.experts[layer], config)
        if weights.shared is not None and weights.shared_gate is not None:
            residual = residual + torch.sigmoid(x @ weights.shared_gate.float().T) * _mlp(x, weights.shared)
    return _norm(residual, head.norm, config.rms_norm_eps) @ head.lm_head.float().T


def greedy(model: Model, prompt_ids: Sequence[int], max_new: int, stop_ids: Collection[int] = ()) -> list[int]:
    """The `max_new` most likely next tokens, or fewer if one of `stop_ids` comes (it is the last of them then)."""
    ids = list(prompt_ids)
    with torch.inference_mode():
        while len(ids) < len(prompt_ids) + max_new:
            ids.append(int(forward(model, ids)[-1].argmax()))
            if ids[-1] in stop_ids:
                break
    return ids[len(prompt_ids) :]

"""The training model: Qwen3-MoE written for one CPU thread, with the same mathematics as transformers' module.

Element-wise work is compiled, and attention over short sequences is written out, because on a CPU the compiled form
is then more than twice as fast as the fused kernel.

Legend: B rows, T positions, N = B*T tokens, H hidden, V vocabulary, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from amoe.builtin.train.config import ModelConfig
from amoe.builtin.train.experts import Experts

HEAD_CHUNK_TOKENS = 1024  # logits of one chunk stay in cache
WRITTEN_OUT_LENGTH = 512  # above it the quadratic scores no longer fit in cache and the fused kernel wins

Reroute = Callable[[int, Tensor], Tensor]  # (layer, router logits [N, E]) -> expert ids [N, k] to use instead


@dataclass(frozen=True)
class Routing:
    """What the router of one layer decided. `mean_probs: [E]` and `z_loss: []` carry gradients."""

    topk_ids: Tensor
    mean_probs: Tensor
    z_loss: Tensor


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


@torch.compile(dynamic=False)
def _attention_half(
    x: Tensor, parts: tuple[Tensor, ...], cos: Tensor, sin: Tensor, mask: Tensor, sizes: tuple[int, int, int, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, attention, residual, norm and router logits: `[B, T, H] -> [B, T, H], [B, T, H], [B, T, E]` (fp32)."""
    input_norm, qkv, q_norm, k_norm, out, post_norm, router = parts
    heads, kv_heads, dim, eps = sizes
    batch, length, _ = x.shape
    projected = F.linear(_rms_norm(x, input_norm, eps), qkv).view(batch, length, heads + 2 * kv_heads, dim)
    query, key, value = projected.transpose(1, 2).split([heads, kv_heads, kv_heads], dim=1)
    query = _rotate(_rms_norm(query, q_norm, eps), cos, sin)
    key = _rotate(_rms_norm(key, k_norm, eps), cos, sin)
    key, value = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (key, value))
    if length > WRITTEN_OUT_LENGTH:
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    else:
        scores = (query @ key.transpose(-1, -2)).float() * dim**-0.5 + mask
        context = torch.softmax(scores, dim=-1).to(x.dtype) @ value
    x = x + F.linear(context.transpose(1, 2).reshape(batch, length, heads * dim), out)
    normed = _rms_norm(x, post_norm, eps)
    return x, normed, F.linear(normed, router).float()


@torch.compile(dynamic=False)
def _route(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`[N, E] -> topk_weights [N, k] (renormalised), topk_ids [N, k], mean probabilities [E], z loss []`."""
    probs = torch.softmax(logits, dim=-1)
    weights, ids = torch.topk(probs, k, dim=-1)
    return weights / weights.sum(-1, keepdim=True), ids, probs.mean(0), torch.logsumexp(logits, dim=-1).pow(2).mean()


@torch.compile(dynamic=True)
def _softmax_loss(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp `[n]` and probabilities `[n, V]` of a chunk of logits."""
    wide = logits.float()
    peak = wide.amax(-1, keepdim=True)
    exps = torch.exp(wide - peak)
    total = exps.sum(-1, keepdim=True)
    return (peak + total.log()).squeeze(-1), (exps / total).to(logits.dtype)


class HeadLoss(torch.autograd.Function):
    """Summed cross entropy of `x [N, H]` through the head `[V, H]`; the forward pass makes the gradients, by chunks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32)
        grad_x, grad_head = torch.empty_like(x), torch.zeros(head.shape, dtype=torch.float32)
        for start in range(0, x.shape[0], HEAD_CHUNK_TOKENS):
            part, target = x[start : start + HEAD_CHUNK_TOKENS], targets[start : start + HEAD_CHUNK_TOKENS]
            logits = part @ head.t()
            log_total, probs = _softmax_loss(logits)
            row = torch.arange(target.numel())
            loss += (log_total - logits[row, target].float()).sum()
            probs[row, target] -= 1
            torch.mm(probs, head, out=grad_x[start : start + HEAD_CHUNK_TOKENS])
            grad_head += probs.t() @ part
        ctx.save_for_backward(grad_x, grad_head)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        grad_x, grad_head = ctx.saved_tensors
        scale = grads[0]
        return grad_x * scale.to(grad_x.dtype), (grad_head * scale).to(grad_x.dtype), None


class Network:
    """Forward pass over a dictionary of parameters (see `parameters.parameter_shapes`)."""

    def __init__(self, config: ModelConfig, reroute: Reroute | None = None) -> None:
        self.config = config
        self.reroute = reroute
        self._tables: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor, Tensor]] = {}

    def tables(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Rotary cosine and sine `[T, D]` and the causal mask `[T, T]`."""
        if (length, dtype) not in self._tables:
            dim = self.config.head_dim
            inverse = self.config.rope_theta ** (-torch.arange(0, dim, 2).float() / dim)
            angles = torch.outer(torch.arange(length).float(), inverse).repeat(1, 2)
            mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
            self._tables[length, dtype] = angles.cos().to(dtype), angles.sin().to(dtype), mask
        return self._tables[length, dtype]

    def hidden(self, params: dict[str, Tensor], tokens: Tensor) -> tuple[Tensor, list[Routing]]:
        """Last hidden states (after the final norm) `[N, H]` of `tokens [B, T]`, and each layer's routing."""
        config = self.config
        sizes = (config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.rms_norm_eps)
        names = ("input_norm", "qkv", "q_norm", "k_norm", "o", "post_norm", "router")
        x = F.embedding(tokens, params["embed"])
        cos, sin, mask = self.tables(tokens.shape[1], x.dtype)
        routings = []
        for layer in range(config.num_hidden_layers):
            parts = tuple(params[f"{layer}.{name}"] for name in names)
            x, normed, logits = _attention_half(x, parts, cos, sin, mask, sizes)
            weights, ids, mean_probs, z_loss = _route(logits.view(-1, config.num_experts), config.num_experts_per_tok)
            if self.reroute is not None:
                ids = self.reroute(layer, logits.view(-1, config.num_experts))
            routings.append(Routing(ids, mean_probs, z_loss))
            flat = normed.view(-1, config.hidden_size)
            out: Any = Experts.apply(flat, weights, ids, params[f"{layer}.gate_up"], params[f"{layer}.down"])
            x = x + out.view_as(x)
        return _rms_norm(x, params["norm"], config.rms_norm_eps).view(-1, config.hidden_size), routings

    def loss(self, params: dict[str, Tensor], tokens: Tensor) -> tuple[Tensor, list[Routing]]:
        """Summed cross entropy (nats) of predicting `tokens[:, 1:]` from `tokens[:, :-1]`, and each layer's routing."""
        states, routings = self.hidden(params, tokens[:, :-1])
        total: Any = HeadLoss.apply(states, params["head"], tokens[:, 1:].reshape(-1))
        return total, routings

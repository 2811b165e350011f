"""Muon for matrices, AdamW for embedding, head, router and norms, over views of the shared flat buffers.

Both ignore the scale of the gradient, so the sum over micro-batches does as well as their mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from amoe.builtin.train.config import TrainConfig

ADAM_BETAS = (0.9, 0.98)
ADAM_EPS = 1e-10
# Quintic iteration whose fixed points lie near 1: five rounds bring singular values into about [0.7, 1.2].
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_ROUNDS = 5


@dataclass(frozen=True)
class Slot:
    """One parameter: fp32 master, its two moments, and the bf16 copy that the network reads. All of the same shape."""

    master: Tensor
    first: Tensor
    second: Tensor
    working: Tensor


def orthogonalise(matrices: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrix of each of `[M, rows, cols]`, approximately, in bf16."""
    x = matrices.to(torch.bfloat16)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_ROUNDS):
        gram = torch.bmm(x, x.transpose(1, 2))
        x = a * x + torch.bmm(b * gram + c * torch.bmm(gram, gram), x)
    return x.transpose(1, 2) if tall else x


def _matrices(name: str, update: Tensor, query_width: int) -> list[Tensor]:
    """The independent matrices `[M, rows, cols]` inside one parameter: query, key, value; gate, up of each expert."""
    kind = name.split(".")[-1]
    if kind == "qkv":
        key_width = (update.shape[0] - query_width) // 2
        return [part.unsqueeze(0) for part in update.split([query_width, key_width, key_width])]
    if kind == "gate_up":
        return [update.view(2 * update.shape[0], update.shape[1] // 2, update.shape[2])]
    return [update if update.dim() == 3 else update.unsqueeze(0)]


def is_matrix(name: str) -> bool:
    """Whether Muon updates this parameter (else AdamW)."""
    return name.split(".")[-1] in {"qkv", "o", "gate_up", "down"}


def update(name: str, slot: Slot, grad: Tensor, config: TrainConfig, rate: float, step: int, query_width: int) -> None:
    """One step on one parameter. `rate` in [0, 1] scales the learning rate; `step` is from 1; `grad` is consumed."""
    if is_matrix(name):
        _muon(name, slot, grad, config, rate, query_width)
    else:
        _adamw(name, slot, grad, config, rate, step)
    slot.working.copy_(slot.master)


def _muon(name: str, slot: Slot, grad: Tensor, config: TrainConfig, rate: float, query_width: int) -> None:
    slot.first.lerp_(grad, 1 - config.momentum)
    nesterov = grad.lerp_(slot.first, config.momentum)
    learning_rate = config.muon_lr * rate
    slot.master.mul_(1 - learning_rate * config.weight_decay)
    parts = zip(_matrices(name, slot.master, query_width), _matrices(name, nesterov, query_width), strict=True)
    for weight, direction in parts:
        scale = max(1.0, direction.shape[1] / direction.shape[2]) ** 0.5
        weight.add_(orthogonalise(direction), alpha=-learning_rate * scale)


def _adamw(name: str, slot: Slot, grad: Tensor, config: TrainConfig, rate: float, step: int) -> None:
    beta1, beta2 = ADAM_BETAS
    special = {"embed": config.embed_lr, "router": config.router_lr}
    learning_rate = rate * special.get(name.split(".")[-1], config.adam_lr)
    slot.first.lerp_(grad, 1 - beta1)
    slot.second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    if slot.master.dim() > 1:
        slot.master.mul_(1 - learning_rate * config.weight_decay)
    scale = (slot.second / (1 - beta2**step)).sqrt_().add_(ADAM_EPS)
    slot.master.addcdiv_(slot.first / (1 - beta1**step), scale, value=-learning_rate)

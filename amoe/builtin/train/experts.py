"""The experts of one layer with their gradient: sort pairs by expert, one matrix product an expert, add up per token.

Each expert's rows are padded to a multiple of `ROW_MULTIPLE`, because the CPU's matrix library compiles a kernel for
every new shape, which costs as much as the product itself; with few shapes they are all in its cache.

Legend: N tokens, k experts per token, P rows (N*k pairs and the padding), H hidden, I expert width, E experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROW_MULTIPLE = 32


class _Layout(NamedTuple):
    """Where pairs lie among the rows, which are sorted by expert."""

    token_of: Tensor  # [P] token of a row; 0 for padding
    row_of: Tensor  # [N*k] row of a pair
    bounds: list[int]  # [E + 1] first row of each expert


def _lay_out(topk_ids: Tensor, num_experts: int) -> _Layout:
    flat_ids = topk_ids.reshape(-1)
    order = torch.argsort(flat_ids, stable=True)
    counts = torch.bincount(flat_ids, minlength=num_experts)
    padded = (counts + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
    shift = (padded.cumsum(0) - padded) - (counts.cumsum(0) - counts)
    rows = torch.arange(order.numel()) + shift[flat_ids[order]]
    bounds = [0, *padded.cumsum(0).tolist()]
    row_of = torch.empty_like(order)
    row_of[order] = rows
    token_of = torch.zeros(bounds[-1], dtype=torch.int64)
    token_of[rows] = order // topk_ids.shape[1]
    return _Layout(token_of, row_of, bounds)


@torch.compile(dynamic=True)
def _activate(gate_up: Tensor) -> Tensor:
    """SwiGLU `[P, 2I] -> [P, I]`, in fp32 inside."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


@torch.compile(dynamic=True)
def _activate_backward(gate_up: Tensor, grad: Tensor) -> Tensor:
    """Gradient of `_activate`: `[P, 2I], [P, I] -> [P, 2I]`."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    sigmoid, upstream = torch.sigmoid(gate), grad.float()
    grad_gate = upstream * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([grad_gate, upstream * gate * sigmoid], dim=-1).to(gate_up.dtype)


@torch.compile(dynamic=True)
def _combine(rows: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum per token: `[N, k, H], [N, k] -> [N, H]`."""
    return (rows.float() * weights.unsqueeze(-1)).sum(dim=1).to(rows.dtype)


@torch.compile(dynamic=True)
def _combine_backward(grad_rows: Tensor, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients in row order: `[P, H], [P, H], [P] -> rows [P, H], weights [P]`."""
    upstream = grad_rows.float()
    return (upstream * weights.unsqueeze(-1)).to(rows.dtype), (upstream * rows.float()).sum(dim=-1)


def _matmul_per_expert(rows: Tensor, weights: Tensor, bounds: list[int], transpose: bool) -> Tensor:
    """Rows sorted by expert times each expert's matrix: `[P, A], [E, B, A] (transpose) -> [P, B]`."""
    out = rows.new_empty(rows.shape[0], weights.shape[1] if transpose else weights.shape[2])
    for expert in range(weights.shape[0]):
        start, stop = bounds[expert], bounds[expert + 1]
        if stop > start:
            weight = weights[expert]
            torch.mm(rows[start:stop], weight.t() if transpose else weight, out=out[start:stop])
    return out


def _weight_gradient(grad: Tensor, rows: Tensor, bounds: list[int]) -> Tensor:
    """Per-expert `grad.T @ rows`: `[P, B], [P, A] -> [E, B, A]`; zero where an expert had no pair."""
    num_experts = len(bounds) - 1
    out = grad.new_zeros(num_experts, grad.shape[1], rows.shape[1])
    for expert in range(num_experts):
        start, stop = bounds[expert], bounds[expert + 1]
        if stop > start:
            torch.mm(grad[start:stop].t(), rows[start:stop], out=out[expert])
    return out


class Experts(torch.autograd.Function):
    """`apply(x [N, H], topk_weights [N, k], topk_ids [N, k], gate_up [E, 2I, H], down [E, H, I]) -> [N, H]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        layout = _lay_out(topk_ids, gate_up.shape[0])
        rows = x.index_select(0, layout.token_of)
        hidden = _matmul_per_expert(rows, gate_up, layout.bounds, transpose=True)
        out_rows = _matmul_per_expert(_activate(hidden), down, layout.bounds, transpose=True)
        ctx.save_for_backward(rows, hidden, out_rows, topk_weights, gate_up, down)
        ctx.layout = layout
        return _combine(out_rows.index_select(0, layout.row_of).view(*topk_ids.shape, -1), topk_weights)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None, Tensor, Tensor]:
        rows, hidden, out_rows, topk_weights, gate_up, down = ctx.saved_tensors
        (token_of, row_of, bounds), (num_tokens, k) = ctx.layout, topk_weights.shape
        grad_rows = grads[0].contiguous().index_select(0, token_of)
        # Padding has weight 0, so its gradients are 0 and the sums over an expert's rows are right.
        row_weights = topk_weights.new_zeros(token_of.shape)
        row_weights[row_of] = topk_weights.reshape(-1)
        grad_out, grad_row_weights = _combine_backward(grad_rows, out_rows, row_weights)
        grad_down = _weight_gradient(grad_out, _activate(hidden), bounds)
        grad_hidden = _activate_backward(hidden, _matmul_per_expert(grad_out, down, bounds, transpose=False))
        grad_gate_up = _weight_gradient(grad_hidden, rows, bounds)
        grad_x_rows = _matmul_per_expert(grad_hidden, gate_up, bounds, transpose=False)
        grad_x = grad_x_rows.index_select(0, row_of).view(num_tokens, k, -1).sum(dim=1)
        grad_weights = grad_row_weights.index_select(0, row_of).view(num_tokens, k)
        return grad_x, grad_weights, None, grad_gate_up, grad_down

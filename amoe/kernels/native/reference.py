"""What the native kernels must come to, written out plainly: products, and experts token by token.

All arithmetic in float32, rounded to the activation type where the kernels round. Shape letters: n tokens, N rows, K
depth, H hidden size, I intermediate size of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from amoe.kernels.native.packing import HALF, LANES, PANEL, PackedExperts, PackedMatrix


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [n, K], RMS-normed first where there is a `norm` [K], times weight [N, K], + bias [N] + residual [n, N].

    Returns:
        [n, N] float32, before the one rounding.
    """
    if norm is not None:
        x = F.rms_norm(x.float(), (x.shape[1],), norm.float(), eps).to(x.dtype)
    out = x.float() @ weight.float().T
    for part in (bias, residual):
        if part is not None:
            out = out + part.float()
    return out


def experts(
    x: torch.Tensor,
    weights_of: Sequence[tuple[torch.Tensor, torch.Tensor] | None],
    ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The sum of the weighted outputs of each token's experts, those that are not here left out.

    Args:
        x: [m, H].
        weights_of: by global id, w13 [2I, H] and w2 [H, I]; None: not here.
        ids, topk_weights: [n, top_k]; -1: none.
        rows: [n] which row of x each token is; None: in order.
        residual: [n, H] is added.

    Returns:
        [n, H] float32, before the one rounding.
    """
    out = torch.zeros((len(ids), x.shape[1])) if residual is None else residual.float().clone()
    for token, row in enumerate(range(len(ids)) if rows is None else rows.tolist()):
        for expert, factor in zip(ids[token].tolist(), topk_weights[token].tolist(), strict=True):
            weights = None if expert < 0 else weights_of[expert]
            if weights is not None:
                w13, w2 = (weight.float() for weight in weights)
                gate, up = (w13 @ x[row].float()).chunk(2)
                output = factor * (w2 @ (F.silu(gate) * up).to(x.dtype).float())
                out[token] += output.to(x.dtype).float()
    return out


def unpacked(packed: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """packed [P, K / 2 or K, 32] as rows [32 P, K], or what int8 has left of them in float32."""
    dtype = next(dtype for dtype, lanes in LANES.items() if lanes == packed.dtype)
    depth = packed.shape[1] * (packed.dtype.itemsize // dtype.itemsize)
    numbers = packed.transpose(1, 2).reshape(-1).view(dtype).view(-1, depth)
    return numbers if scales is None else numbers.float() * scales[:, None]


def unpacked_matrix(matrix: PackedMatrix) -> torch.Tensor:
    """[N, K] that has been packed."""
    return unpacked(matrix.data, matrix.scales)[: matrix.rows]


def unpacked_expert(
    packed: PackedExperts, local: int, hidden: int, intermediate: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """w13 [2I, H], gate rows then up rows, and w2 [H, I] of one expert."""
    scales = [None if part is None else part[local] for part in (packed.w13_scales, packed.w2_scales)]
    panels = unpacked(packed.w13[local], scales[0]).view(-1, PANEL, hidden)
    gate, up = (panels[:, part].flatten(0, 1)[:intermediate] for part in (slice(0, HALF), slice(HALF, PANEL)))
    return torch.cat((gate, up)), unpacked(packed.w2[local], scales[1])[:hidden]

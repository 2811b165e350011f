"""What the tests of products and experts share: kinds of weights, and the calls with tensors instead of addresses."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from amoe.kernels.native import reference
from amoe.kernels.native.packing import PackedExperts, PackedMatrix
from tests.unit.kernels.native_cases import address


class Kind(NamedTuple):
    """Of weights, and of the activations that they meet."""

    dtype: torch.dtype
    quantize: bool


KINDS = {
    "bfloat16": Kind(torch.bfloat16, False),
    "float32": Kind(torch.float32, False),
    "int8-bfloat16": Kind(torch.bfloat16, True),
    "int8-float32": Kind(torch.float32, True),
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(context, x, matrix, *, norm=None, eps=1e-5, bias=None, residual=None, out=None):
    """out [n, N], float32 unless it is given; x and out may have rows apart."""
    n = len(x)
    out = torch.empty(n, matrix.rows) if out is None else out
    is_float = out.dtype == torch.float32
    context.linear(
        *(x.data_ptr(), x.stride(0), n, address(norm), eps, matrix.handle, address(bias), address(residual)),
        *(out.data_ptr(), out.stride(0), is_float),
    )
    return out


class Layer(NamedTuple):
    """Experts that are here, packed; the weights by global id that they stand for; and where each id is."""

    packed: PackedExperts
    weights_of: list[tuple[torch.Tensor, torch.Tensor] | None]
    local_index: torch.Tensor


def layer_of(kind, held, num_experts, hidden, intermediate):
    """Random experts."""
    packed = PackedExperts.empty(held, hidden, intermediate, kind.dtype, quantize=kind.quantize)
    weights_of, local_index = [None] * num_experts, torch.full((num_experts,), -1)
    for local, expert in enumerate(held):
        w13 = random(2 * intermediate, hidden, seed=expert, dtype=kind.dtype)
        w2 = random(hidden, intermediate, seed=100 + expert, dtype=kind.dtype)
        packed.put(local, w13 / hidden**0.5, w2 / intermediate**0.5)
        weights_of[expert] = reference.unpacked_expert(packed, local, hidden, intermediate)
        local_index[expert] = local
    return Layer(packed, weights_of, local_index)


def experts(context, layer, x, ids, weights, *, rows=None, residual=None, out=None):
    """out [n, H]: of the activation type with a residual, float32 without one."""
    n, top_k = ids.shape
    dtype = torch.float32 if residual is None else x.dtype
    out = torch.empty(n, x.shape[1], dtype=dtype) if out is None else out
    context.experts(
        *(layer.packed.handle, x.data_ptr(), address(rows), n, ids.data_ptr(), weights.data_ptr(), top_k),
        *(layer.local_index.data_ptr(), address(residual), out.data_ptr()),
    )
    return out


def matrix_of(kind, rows, depth, seed=0):
    """A random matrix, packed, and what it stands for."""
    matrix = PackedMatrix.of(random(rows, depth, seed=seed, dtype=kind.dtype), quantize=kind.quantize)
    return matrix, reference.unpacked_matrix(matrix)


def assert_rounded(ours, expected, dtype):
    """ours is expected, rounded to `dtype`, up to the order of the sums (numbers of order 1)."""
    tolerance = {"rtol": 2**-7, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 5e-5}
    torch.testing.assert_close(ours.float(), expected, **tolerance)

"""What `benchmarks.kernels` compares: products and experts on random weights, each by several implementations.

Weights come in copies, more than the caches hold together, and calls take them in turn: a layer's weights are never
still there from the step before. Shape letters as in `amoe.kernels.native.packing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from amoe.kernels.grouped_gemm import ExpertViews, expert_views, grouped_experts
from amoe.kernels.native import _native
from amoe.kernels.native.packing import PackedExperts, PackedMatrix
from amoe.kernels.permute import PairPlan, plan_pairs

OURS, OURS_INT8, ONEDNN = "amoe", "amoe int8", "oneDNN, prepacked"
_PREPACKS_FOR = 64  # rows that oneDNN's layout is chosen for
_TENTH = 0.1  # of standard normal numbers: products stay of order 1

Call = Callable[[int], torch.Tensor]


class Case(NamedTuple):
    """One table row.

    Attributes:
        weight_bytes: in bfloat16, that must be read.
        operations: that must be done.
        calls: by name of the implementation; each takes a running number, which chooses the copy of the weights.
    """

    tokens: int
    weight_bytes: float
    operations: float
    calls: dict[str, Call]


def _random(*shape: int, scale: float = _TENTH) -> torch.Tensor:
    return torch.randn(shape).mul_(scale).bfloat16()


def _in_turns(function: Callable[..., torch.Tensor], copies: Sequence[Any], *args: Any) -> Call:
    """`function` of `args` and of one copy of the weights after the other."""
    return lambda number: function(*args, copies[number % len(copies)])


def _prepacked(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, _PREPACKS_FOR)


def _onednn_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def linear_cases(
    context: _native.Context, rows: int, depth: int, tokens: tuple[int, ...], copies: int
) -> Iterator[Case]:
    """x [n, K] times w [N, K]."""
    weights = [_random(rows, depth) for _ in range(copies)]
    ours, int8 = ([PackedMatrix.of(weight, quantize=quantize) for weight in weights] for quantize in (False, True))
    packed = [_prepacked(weight) for weight in weights]
    for n in tokens:
        x = _random(n, depth, scale=1.0)
        calls = {
            OURS: _in_turns(_native_linear, ours, context, x),
            OURS_INT8: _in_turns(_native_linear, int8, context, x),
            ONEDNN: _in_turns(_onednn_linear, packed, x),
            "F.linear": _in_turns(F.linear, weights, x),
        }
        yield Case(n, 2.0 * rows * depth, 2.0 * n * rows * depth, calls)


def _native_linear(context: _native.Context, x: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
    out = x.new_empty(len(x), matrix.rows)
    context.linear(
        *(x.data_ptr(), x.stride(0), len(x), 0, 0.0, matrix.handle, 0, 0),
        *(out.data_ptr(), out.stride(0), False),
    )
    return out


class ExpertsShape(NamedTuple):
    """Of the experts of a layer."""

    num_experts: int
    top_k: int
    hidden: int
    intermediate: int


class Routed(NamedTuple):
    """A batch: x [n, H], ids [n, K] int64, weights [n, K] float32."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


def experts_cases(
    context: _native.Context, shape: ExpertsShape, tokens: tuple[int, ...], copies: int
) -> Iterator[Case]:
    """Experts that are chosen evenly, at random."""
    num_experts, top_k, hidden, intermediate = shape
    layers = [
        (_random(num_experts, 2 * intermediate, hidden), _random(num_experts, hidden, intermediate))
        for _ in range(copies)
    ]
    ours, int8 = ([_packed_experts(*layer, quantize=quantize) for layer in layers] for quantize in (False, True))
    packed = [([_prepacked(w) for w in w13], [_prepacked(w) for w in w2]) for w13, w2 in layers]
    torchs = [(*layer, expert_views(*layer)) for layer in layers]
    local = torch.arange(num_experts).numpy()
    for n in tokens:
        ids = torch.rand(n, num_experts).argsort(dim=1)[:, :top_k].contiguous()
        batch = Routed(_random(n, hidden, scale=1.0), ids, torch.full((n, top_k), 1.0 / top_k))
        plan = plan_pairs(batch.ids.numpy(), batch.weights.numpy(), local)
        calls = {
            OURS: _in_turns(_native_experts, ours, context, batch),
            OURS_INT8: _in_turns(_native_experts, int8, context, batch),
            ONEDNN: _in_turns(_loop, packed, batch),
            "F.grouped_mm": _in_turns(_grouped_mm, layers, batch),
            "a loop of mm": _in_turns(_torch_kernels, torchs, batch, plan),
        }
        expert_bytes = 2.0 * 3 * hidden * intermediate
        yield Case(n, len(ids.unique()) * expert_bytes, n * top_k * expert_bytes, calls)


def _packed_experts(w13: torch.Tensor, w2: torch.Tensor, *, quantize: bool) -> PackedExperts:
    count, hidden, intermediate = w2.shape
    packed = PackedExperts.empty(range(count), hidden, intermediate, w13.dtype, quantize=quantize)
    for local in range(count):
        packed.put(local, w13[local], w2[local])
    return packed


def _native_experts(context: _native.Context, batch: Routed, packed: PackedExperts) -> torch.Tensor:
    out = torch.empty(batch.x.shape)  # float32: a sum that is to be added to those of other workers
    context.experts(
        *(packed.handle, batch.x.data_ptr(), 0, len(out), batch.ids.data_ptr(), batch.weights.data_ptr()),
        *(batch.ids.shape[1], 0, 0, out.data_ptr()),
    )
    return out


def _activate(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _combine(batch: Routed, order: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """Rows [n K, H], sorted by `order`, to the weighted sum of each token."""
    unsorted = torch.empty_like(outputs)
    unsorted[order] = outputs
    return torch.bmm(batch.weights.bfloat16().unsqueeze(1), unsorted.view(*batch.ids.shape, -1)).squeeze(1)


def _grouped_mm(batch: Routed, layer: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """As transformers does it."""
    w13, w2 = layer
    order = batch.ids.view(-1).argsort(stable=True)
    ends = torch.bincount(batch.ids.view(-1), minlength=len(w13)).cumsum(0).to(torch.int32)
    rows: Any = batch.x[order // batch.ids.shape[1]]
    activated = _activate(F.grouped_mm(rows, w13.transpose(1, 2), offs=ends))
    return _combine(batch, order, F.grouped_mm(activated, w2.transpose(1, 2), offs=ends))


def _torch_kernels(
    batch: Routed, plan: PairPlan, layer: tuple[torch.Tensor, torch.Tensor, ExpertViews]
) -> torch.Tensor:
    """As amoe does it where there are no native kernels; planning is not counted."""
    return grouped_experts(batch.x, plan, *layer)


def _loop(batch: Routed, layer: tuple[list[torch.Tensor], list[torch.Tensor]]) -> torch.Tensor:
    """Expert by expert, with weights in oneDNN's own layout."""
    w13, w2 = layer
    order = batch.ids.view(-1).argsort(stable=True)
    counts = torch.bincount(batch.ids.view(-1), minlength=len(w13)).tolist()
    rows = batch.x[order // batch.ids.shape[1]]
    outputs = [
        _onednn_linear(_activate(_onednn_linear(part, w13[expert])), w2[expert])
        for expert, part in enumerate(rows.split(counts))
        if len(part)
    ]
    return _combine(batch, order, torch.cat(outputs))


def small_calls(
    context: _native.Context, n: int, hidden: int, num_experts: int, top_k: int, vocab: int
) -> dict[str, tuple[Call, Call]]:
    """Ours and torch's, by name; their time is mostly that of a call."""
    x, norm, logits, wide = _random(n, hidden), _random(hidden), torch.randn(n, num_experts), torch.randn(n, vocab)
    out, ids, weights = torch.empty_like(x), torch.empty(n, top_k, dtype=torch.int64), torch.empty(n, top_k)
    scores, best = torch.empty(n, num_experts), torch.empty(n, dtype=torch.int64)

    def rms_norm(_: int) -> torch.Tensor:
        context.rms_norm(x.data_ptr(), hidden, norm.data_ptr(), 1e-6, out.data_ptr(), hidden, n, hidden)
        return out

    def route(_: int) -> torch.Tensor:
        addresses = (ids.data_ptr(), weights.data_ptr(), scores.data_ptr())
        context.route(logits.data_ptr(), n, num_experts, top_k, True, False, *addresses)
        return weights

    def torch_route(_: int) -> torch.Tensor:
        chosen, _ids = logits.softmax(-1).topk(top_k)
        return chosen / chosen.sum(-1, keepdim=True)

    def argmax(_: int) -> torch.Tensor:
        context.argmax(wide.data_ptr(), n, vocab, best.data_ptr())
        return best

    return {
        "RMSNorm": (rms_norm, lambda _: F.rms_norm(x, (hidden,), norm, 1e-6)),
        f"router: softmax, top {top_k} of {num_experts}": (route, torch_route),
        f"argmax of {vocab} logits": (argmax, lambda _: wide.argmax(-1)),
    }

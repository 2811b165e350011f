"""The native experts against a loop over tokens, and bit for bit the same in any batch."""

from __future__ import annotations

import functools

import pytest
import torch

from amoe.kernels import native
from amoe.kernels.native import reference
from tests.unit.kernels.native_cases import each_isa, needs_native
from tests.unit.kernels.native_products import KINDS, assert_rounded, each_kind, experts, layer_of, random

pytestmark = needs_native

NUM_EXPERTS, TOP_K = 7, 3
SHAPES = ((48, 36), (64, 32), (50, 6), (33, 17))  # hidden, intermediate; the last one odd
HELD = (0, 2, 3, 6)


def route(n, *, seed=0, num_experts=NUM_EXPERTS):
    """ids and weights [n, TOP_K]; some pairs are none, and token 1 has none at all."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(n, num_experts, generator=generator).argsort(dim=1)[:, :TOP_K].contiguous()
    ids[torch.rand(n, TOP_K, generator=generator) < 0.1] = -1
    ids[1:2] = -1
    return ids, torch.rand(n, TOP_K, generator=generator)


@functools.cache
def case(kind, hidden, intermediate, n):
    """Everything that `experts` gets, and what must come of it."""
    layer = layer_of(KINDS[kind], HELD, NUM_EXPERTS, hidden, intermediate)
    x = random(n, hidden, seed=n, dtype=KINDS[kind].dtype)
    ids, weights = route(n, seed=n)
    return layer, x, ids, weights, reference.experts(x, layer.weights_of, ids, weights)


def shapes_of(kind):
    return [shape for shape in SHAPES if kind == "float32" or not any(width % 2 for width in shape)]


@each_isa
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 13, 40, 200])
def test_equals_a_loop_over_tokens(isa, kind, n):
    context = native.make_context(KINDS[kind].dtype, 2, isa=isa)
    for hidden, intermediate in shapes_of(kind):
        layer, x, ids, weights, expected = case(kind, hidden, intermediate, n)
        out = experts(context, layer, x, ids, weights)
        assert_rounded(out, expected, x.dtype)
        assert not out[1:2].any(), "a token without experts"


@each_isa
@each_kind
def test_chosen_rows_and_a_residual(isa, kind):
    context = native.make_context(kind.dtype, 2, isa=isa)
    layer = layer_of(kind, HELD, NUM_EXPERTS, 48, 36)
    x, residual = random(90, 48, dtype=kind.dtype), random(40, 48, seed=2, dtype=kind.dtype)
    ids, weights = route(40)
    rows = torch.randperm(90, generator=torch.Generator().manual_seed(0))[:40].contiguous()
    out = experts(context, layer, x, ids, weights, rows=rows, residual=residual)
    expected = reference.experts(x, layer.weights_of, ids, weights, rows=rows, residual=residual)
    assert_rounded(out, expected, kind.dtype)
    assert torch.equal(out[1], residual[1])
    assert torch.equal(out, experts(context, layer, x[rows], ids, weights, residual=residual))
    in_place = residual.clone()
    assert torch.equal(out, experts(context, layer, x, ids, weights, rows=rows, residual=in_place, out=in_place))


@each_isa
@each_kind
def test_bits_depend_on_the_token_alone(isa, kind):
    layer = layer_of(kind, HELD, NUM_EXPERTS, 64, 36)
    x = random(200, 64, dtype=kind.dtype)
    ids, weights = route(200)
    one, three = (native.make_context(kind.dtype, threads, isa=isa) for threads in (1, 3))
    together = experts(three, layer, x, ids, weights)
    for n in (1, 2, 13, 77, 199):
        assert torch.equal(experts(one, layer, x[-n:], ids[-n:].contiguous(), weights[-n:].contiguous()), together[-n:])


@each_isa
@pytest.mark.parametrize("kind", [name for name in KINDS if name.endswith("bfloat16")])
def test_it_does_not_matter_who_holds_which_experts(isa, kind):
    """Bit for bit: sums of rounded outputs are exact, whoever adds up whichever of them, in whatever order."""
    kind, everybody, n, hidden = KINDS[kind], range(8), 100, 512
    context = native.make_context(kind.dtype, 2, isa=isa)
    x, residual = random(n, hidden, dtype=kind.dtype), random(n, hidden, seed=3, dtype=kind.dtype)
    ids, weights = (
        torch.rand(n, 8, generator=torch.Generator().manual_seed(1)).argsort(dim=1),
        random(n, 8, seed=2).abs(),
    )
    whole = experts(context, layer_of(kind, everybody, 8, hidden, 64), x, ids, weights, residual=residual)
    order = torch.rand(n, 8, generator=torch.Generator().manual_seed(4)).argsort(dim=1)
    shuffled = experts(
        *(context, layer_of(kind, everybody, 8, hidden, 64), x, ids.gather(1, order), weights.gather(1, order)),
        residual=residual,
    )
    assert torch.equal(shuffled, whole)
    for holders in ([(0, 1, 2, 3), (4, 5, 6, 7)], [(7,), (0, 2, 4, 6), (1, 3, 5)], [(i,) for i in everybody]):
        total = torch.zeros(n, hidden)
        for held in holders:
            total += experts(context, layer_of(kind, held, 8, hidden, 64), x, ids, weights)
        assert torch.equal((total + residual.float()).to(kind.dtype), whole), holders


@each_isa
@each_kind
def test_one_expert_may_have_all_tokens(isa, kind):
    layer = layer_of(kind, HELD, NUM_EXPERTS, 48, 36)
    x, ids = random(120, 48, dtype=kind.dtype), torch.full((120, 1), 3)
    ids[60:] = 5  # which is not here
    out = experts(native.make_context(kind.dtype, 2, isa=isa), layer, x, ids, torch.ones(120, 1))
    assert_rounded(out, reference.experts(x, layer.weights_of, ids, torch.ones(120, 1)), kind.dtype)
    assert not out[60:].any()


@each_isa
@each_kind
def test_nobody_here_or_nobody_asked(isa, kind):
    context = native.make_context(kind.dtype, 2, isa=isa)
    layer = layer_of(kind, (2,), NUM_EXPERTS, 48, 36)
    x, ids = random(5, 48, dtype=kind.dtype), torch.tensor([[0, 1, 3]]).repeat(5, 1)
    residual = random(5, 48, seed=1, dtype=kind.dtype)
    assert not experts(context, layer, x, ids, torch.ones(5, 3)).any()
    assert torch.equal(experts(context, layer, x, ids, torch.ones(5, 3), residual=residual), residual)
    assert experts(context, layer, x[:0], ids[:0], torch.ones(0, 3)).shape == (0, 48)


@each_isa
@each_kind
def test_a_nan_stays_with_its_token(isa, kind):
    layer = layer_of(kind, HELD, NUM_EXPERTS, 48, 36)
    x, ids = random(30, 48, dtype=kind.dtype), torch.full((30, 1), 2)
    x[17, 3] = float("nan")
    out = experts(native.make_context(kind.dtype, 2, isa=isa), layer, x, ids, torch.ones(30, 1))
    assert out[17].isnan().all()
    assert not out[torch.arange(30) != 17].isnan().any()


@each_isa
def test_what_others_leave_in_scratch_memory_changes_nothing(isa):
    """The same context serves large and small steps of layers of different widths."""
    used = native.make_context(torch.bfloat16, 2, isa=isa)
    large = layer_of(KINDS["bfloat16"], HELD, NUM_EXPERTS, 128, 96)
    small = layer_of(KINDS["int8-bfloat16"], HELD, NUM_EXPERTS, 48, 6)
    x = random(100, 128, dtype=torch.bfloat16)
    experts(used, large, x * float("nan"), *route(100))
    ids, weights = route(9)
    ours = experts(used, small, x[:9, :48].contiguous(), ids, weights)
    fresh = experts(native.make_context(torch.bfloat16, 2, isa=isa), small, x[:9, :48].contiguous(), ids, weights)
    assert torch.equal(ours, fresh)


@each_isa
@each_kind
def test_large_steps_go_in_slices(isa, kind):
    """Whose bits are those of the whole: see `kPairsPerSlice`."""
    n, context = 9000, native.make_context(kind.dtype, 2, isa=isa)
    layer = layer_of(kind, (0, 1), 2, 16, 6)
    x, residual = random(50, 16, dtype=kind.dtype), random(n, 16, seed=1, dtype=kind.dtype)
    rows, ids, weights = torch.arange(n) % 50, torch.arange(2 * n).view(n, 2) % 3 % 2, random(n, 2, seed=2)
    together = experts(context, layer, x, ids, weights, rows=rows, residual=residual)
    for start in range(0, n, 1000):
        part = slice(start, start + 1000)
        alone = experts(context, layer, x, ids[part], weights[part], rows=rows[part], residual=residual[part])
        assert torch.equal(together[part], alone)
    assert torch.equal(experts(context, layer, x[rows], ids, weights, residual=residual), together)

"""The native products with packed weights: against the oracle, and bit for bit the same in any batch."""

from __future__ import annotations

import functools

import pytest
import torch

from amoe.kernels import native
from amoe.kernels.native import reference
from tests.unit.kernels.native_cases import each_isa, needs_native
from tests.unit.kernels.native_products import KINDS, assert_rounded, each_kind, linear, matrix_of, random

pytestmark = needs_native

SHAPES = ((96, 128), (100, 64), (33, 46), (1, 2), (31, 250))  # rows, depth
NUMS_ROWS = (*range(1, 41), 200)


@functools.cache
def case(kind, rows, depth):
    """x, weights packed, and the product."""
    matrix, weight = matrix_of(KINDS[kind], rows, depth, seed=rows)
    x = random(200, depth, seed=1, dtype=KINDS[kind].dtype)
    return x, matrix, reference.linear(x, weight)


@each_isa
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_oracle_for_any_number_of_rows(isa, kind, shape):
    context = native.make_context(KINDS[kind].dtype, 2, isa=isa)
    x, matrix, expected = case(kind, *shape)
    for n in NUMS_ROWS:
        torch.testing.assert_close(linear(context, x[:n], matrix), expected[:n], rtol=1e-4, atol=1e-4)


@each_isa
def test_an_odd_depth_in_float32(isa):
    matrix, weight = matrix_of(KINDS["float32"], 40, 45)
    x = random(13, 45)
    ours = linear(native.make_context(torch.float32, 1, isa=isa), x, matrix)
    torch.testing.assert_close(ours, reference.linear(x, weight), rtol=1e-4, atol=1e-4)


@each_isa
@each_kind
def test_bits_depend_on_the_row_alone(isa, kind):
    matrix, _ = matrix_of(kind, 100, 130)
    x = random(200, 130, dtype=kind.dtype)
    one, three = (native.make_context(kind.dtype, threads, isa=isa) for threads in (1, 3))
    together = linear(three, x, matrix)
    for n in (1, 2, 3, 12, 13, 40, 199):
        assert torch.equal(linear(one, x[-n:], matrix), together[-n:])


@each_isa
@each_kind
@pytest.mark.parametrize("rows", [100, 96])
def test_norm_bias_and_residual(isa, kind, rows):
    context = native.make_context(kind.dtype, 2, isa=isa)
    matrix, weight = matrix_of(kind, rows, 64)
    x = random(29, 64, seed=1, dtype=kind.dtype) / 8
    norm, bias = random(64, seed=2, dtype=kind.dtype) / 8, random(rows, seed=3, dtype=kind.dtype)
    residual = random(29, rows, seed=4, dtype=kind.dtype)
    for parts in ({"bias": bias}, {"residual": residual}, {"norm": norm}, {"bias": bias, "residual": residual}):
        out = linear(context, x, matrix, out=torch.empty(29, rows, dtype=kind.dtype), **parts)
        assert_rounded(out, reference.linear(x, weight, eps=1e-5, **parts), kind.dtype)
        assert torch.equal(out, linear(context, x, matrix, **parts).to(kind.dtype)), "one rounding, at the end"


@each_isa
@each_kind
def test_rows_may_lie_apart_and_nothing_else_is_written(isa, kind):
    context = native.make_context(kind.dtype, 2, isa=isa)
    matrix, weight = matrix_of(kind, 37, 64)
    x, out = random(9, 80, dtype=kind.dtype)[:, 8:72], torch.full((11, 50), 7.0)
    linear(context, x, matrix, out=out[1:10, 5:42])
    torch.testing.assert_close(out[1:10, 5:42], reference.linear(x, weight), rtol=1e-4, atol=1e-4)
    out[1:10, 5:42] = 7.0
    assert (out == 7.0).all()


@each_isa
@each_kind
def test_a_nan_stays_in_its_row(isa, kind):
    matrix, _ = matrix_of(kind, 64, 32)
    x = random(30, 32, dtype=kind.dtype)
    x[17, 3] = float("nan")
    out = linear(native.make_context(kind.dtype, 2, isa=isa), x, matrix)
    assert out[17].isnan().all()
    assert not out[torch.arange(30) != 17].isnan().any()


@each_isa
@each_kind
def test_no_rows_are_no_work(isa, kind):
    matrix, _ = matrix_of(kind, 64, 32)
    assert linear(native.make_context(kind.dtype, 2, isa=isa), random(0, 32, dtype=kind.dtype), matrix).shape == (0, 64)


@pytest.mark.parametrize("kind", ["bfloat16", "int8-bfloat16"])
def test_instruction_sets_agree(kind):
    """They may differ in the order within a pair, and in nothing else."""
    x, matrix, _ = case(kind, 96, 128)
    results = [linear(native.make_context(x.dtype, 2, isa=isa), x, matrix) for isa in native.instruction_sets()]
    for result in results:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)

"""What `python -m benchmarks.kernels` compares, on tiny shapes, and what it makes of its measurements."""

from __future__ import annotations

import pytest
import torch

from amoe.kernels import native
from benchmarks import kernels
from benchmarks.kernels_products import OURS, Case, ExpertsShape, experts_cases, linear_cases, small_calls

needs_native = pytest.mark.skipif(not native.is_available(), reason="the native kernels are not built")


@needs_native
@torch.inference_mode()
def test_all_implementations_compute_the_same():
    context = native.make_context(torch.bfloat16, 2)
    shape = ExpertsShape(num_experts=4, top_k=2, hidden=64, intermediate=32)
    cases = [*experts_cases(context, shape, (1, 9), copies=2), *linear_cases(context, 96, 64, (1, 9), copies=2)]
    assert [case.tokens for case in cases] == [1, 9, 1, 9]
    for case in cases:
        kernels.verify(case)
        for call in case.calls.values():
            assert torch.equal(call(1), call(3)), "two copies take turns"
    assert cases[3].operations == 2 * 9 * 96 * 64
    assert cases[0].weight_bytes == 2 * (3 * 64 * 32) * 2, "two experts have the token"


@needs_native
def test_small_kernels_compute_the_same():
    context = native.make_context(torch.bfloat16, 2)
    for ours, theirs in small_calls(context, 5, hidden=64, num_experts=8, top_k=2, vocab=50).values():
        torch.testing.assert_close(ours(0), theirs(0), rtol=2e-2, atol=2e-2)


def test_a_difference_is_no_figure():
    calls = {OURS: lambda _: torch.ones(2, 3), "theirs": lambda _: torch.full((2, 3), 1.1)}
    with pytest.raises(AssertionError, match=r"theirs differs from amoe by 10.0% with 2 tokens"):
        kernels.verify(Case(2, 1.0, 1.0, calls))


def test_the_roofline_is_that_of_the_round():
    case = Case(8, weight_bytes=1e6, operations=1e6, calls=dict.fromkeys((OURS, "theirs"), torch.zeros))
    seconds = {OURS: [20e-6, 40e-6, 30e-6], "theirs": [40e-6, 80e-6, 90e-6]}
    assert kernels.row(case, seconds, [100e9, 50e9, 50e9], 1e12) == "| 8 | 50 | 20 | 30 | 50% | 80 (2.00) |"
    assert kernels.row(case, seconds, [100e9, 50e9, 50e9], 1e11 / 2) == "| 8 | 50 | 20 | 30 | 67% | 80 (2.00) |"


def test_implementations_take_turns_in_every_round():
    calls = []
    seconds, bandwidths = kernels.measure(
        {name: lambda number, name=name: calls.append((name, number)) for name in "ab"}, rounds=2, num_threads=0
    )
    first = [name for name, number in calls if number == 0]
    assert first == ["a", "b", "b", "a"]
    assert bandwidths == []
    assert {name: len(found) for name, found in seconds.items()} == {"a": 2, "b": 2}

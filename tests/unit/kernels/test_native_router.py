"""The native router and argmax against torch."""

from __future__ import annotations

import pytest
import torch

from amoe.kernels import native
from tests.unit.kernels.native_cases import address, each_isa, needs_native

pytestmark = needs_native

NAN, INFINITY = float("nan"), float("inf")


def route(context, logits, top_k, *, normalise=False, round_to_t=False, with_scores=True):
    n, num_experts = logits.shape
    ids, weights = torch.empty(n, top_k, dtype=torch.int64), torch.empty(n, top_k)
    scores = torch.empty(n, num_experts) if with_scores else None
    context.route(
        logits.data_ptr(),
        n,
        num_experts,
        top_k,
        normalise,
        round_to_t,
        ids.data_ptr(),
        weights.data_ptr(),
        address(scores),
    )
    return ids, weights, scores


def argmax(context, logits):
    ids = torch.full((len(logits),), -1, dtype=torch.int64)
    context.argmax(logits.data_ptr(), *logits.shape, ids.data_ptr())
    return ids


@each_isa
@pytest.mark.parametrize(("n", "num_experts", "top_k"), [(1, 8, 2), (9, 32, 4), (40, 60, 4), (17, 128, 8), (3, 5, 5)])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("round_to_t", [True, False])
def test_route_equals_torch(isa, n, num_experts, top_k, normalise, round_to_t):
    logits = torch.randn(n, num_experts, generator=torch.Generator().manual_seed(n)) * 3
    context = native.make_context(torch.bfloat16, 2, isa=isa)
    ids, weights, scores = route(context, logits, top_k, normalise=normalise, round_to_t=round_to_t)
    expected_scores = torch.softmax(logits, dim=-1)
    expected, expected_ids = torch.topk(expected_scores, top_k, dim=-1)
    if normalise:
        expected = expected / expected.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(scores, expected_scores, rtol=1e-5, atol=1e-8)
    assert torch.equal(ids, expected_ids)
    if round_to_t:
        assert torch.equal(weights, weights.bfloat16().float())
    torch.testing.assert_close(weights, expected, rtol=2**-8 if round_to_t else 1e-5, atol=0)
    without = route(context, logits, top_k, normalise=normalise, round_to_t=round_to_t, with_scores=False)
    assert torch.equal(without[0], ids) and torch.equal(without[1], weights)


@each_isa
def test_route_takes_the_lowest_of_equals(isa):
    logits = torch.zeros(2, 40)
    logits[1, [39, 17, 16]] = 2.0
    ids, _, _ = route(native.make_context(torch.float32, 1, isa=isa), logits, 4)
    assert ids.tolist() == [[0, 1, 2, 3], [16, 17, 39, 0]]


@each_isa
def test_route_gives_valid_and_distinct_ids_whatever_comes(isa):
    logits = torch.zeros(4, 33)
    logits[0] = NAN
    logits[1, 5] = NAN
    logits[2] = -INFINITY
    logits[3, 32] = INFINITY
    ids, _, _ = route(native.make_context(torch.float32, 1, isa=isa), logits, 8, normalise=True)
    for row in ids.tolist():
        assert len(set(row)) == 8 and min(row) >= 0 and max(row) < 33


@each_isa
def test_bits_of_a_route_depend_on_the_row_alone(isa):
    logits = torch.randn(50, 36, generator=torch.Generator().manual_seed(1))
    one, three = (native.make_context(torch.float32, threads, isa=isa) for threads in (1, 3))
    together = route(three, logits, 4, normalise=True)
    for row in (0, 7, 49):
        alone = route(one, logits[row : row + 1], 4, normalise=True)
        assert all(torch.equal(a, b[row : row + 1]) for a, b in zip(alone, together, strict=True))


@each_isa
@pytest.mark.parametrize("vocab_size", [1, 15, 8192, 20_001])
@pytest.mark.parametrize("n", [1, 5])
def test_argmax_equals_torch(isa, vocab_size, n):
    logits = torch.randn(n, vocab_size, generator=torch.Generator().manual_seed(n))
    assert torch.equal(argmax(native.make_context(torch.float32, 3, isa=isa), logits), logits.argmax(dim=1))


@each_isa
def test_argmax_takes_the_lowest_of_equals_and_passes_over_nan(isa):
    logits = torch.full((6, 20_001), -5.0)
    logits[0, [3, 19, 9000]] = 1.0
    logits[1, [20_000, 8192]] = 1.0
    logits[2] = NAN
    logits[3, 100] = NAN
    logits[4] = -INFINITY
    logits[5, [17, 33]] = INFINITY
    ids = argmax(native.make_context(torch.float32, 2, isa=isa), logits).tolist()
    assert ids == [3, 8192, 0, 0, 0, 17]

"""`grouped_experts` against its oracle, and against the other ways to arrive at the same sum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amoe.kernels import grouped_gemm
from amoe.kernels.grouped_gemm import expert_views, grouped_experts, grouped_experts_reference
from amoe.kernels.permute import plan_pairs


def make_case(seed, num_tokens, top_k, num_experts, hidden, size, absent=0.2, dtype=torch.float32):
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    ids = np.array([rng.permutation(num_experts)[:top_k] for _ in range(num_tokens)], np.int16)
    ids = ids.reshape(num_tokens, top_k)
    ids[rng.random(ids.shape) < absent] = -1
    weights = rng.random(ids.shape, np.float32)
    w13 = torch.randn(num_experts, 2 * size, hidden, generator=generator).div(hidden**0.5).to(dtype)
    w2 = torch.randn(num_experts, hidden, size, generator=generator).div(size**0.5).to(dtype)
    return torch.randn(num_tokens, hidden, generator=generator).to(dtype), ids, weights, w13, w2


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_tokens=st.integers(1, 20),
    top_k=st.integers(1, 4),
    extra=st.integers(0, 6),
    hidden=st.sampled_from([5, 16, 33]),
    size=st.sampled_from([3, 8, 21]),
    absent=st.sampled_from([0.0, 0.4, 1.0]),
    padded=st.booleans(),
)
def test_equals_the_oracle(seed, num_tokens, top_k, extra, hidden, size, absent, padded):
    x, ids, weights, w13, w2 = make_case(seed, num_tokens, top_k, top_k + extra, hidden, size, absent)
    plan = plan_pairs(ids, weights, np.arange(len(w13)))
    kept = x.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped_gemm, "_padding_pays", lambda plan, w13: padded)
        ours = grouped_experts(x, plan, w13, w2)
    torch.testing.assert_close(ours, grouped_experts_reference(x, plan, w13, w2), atol=2e-5, rtol=1e-4)
    assert torch.equal(x, kept), "the inputs belong to the caller"


def test_padding_is_for_few_rows_over_most_experts():
    def pays(counts, num_experts):
        ids = np.repeat(np.arange(len(counts)), counts)[:, None].astype(np.int16)
        plan = plan_pairs(ids, np.ones(ids.shape, np.float32), np.arange(num_experts))
        w13 = torch.empty(num_experts, 2, 1, dtype=torch.bfloat16)
        assert not grouped_gemm._padding_pays(plan, w13.float())
        return grouped_gemm._padding_pays(plan, w13)

    assert pays([2, 2, 3, 1], 4)
    assert pays([2, 2, 3, 0], 4)
    assert not pays([1, 1, 0, 0], 4), "it would read the weights of experts that nobody asked for"
    assert not pays([17, 17, 17, 17], 4), "the products are worth a call each"
    assert not pays([16, 1, 1, 1, 1, 1, 1, 1], 8), "most of the rows would be padding"


def test_bfloat16_is_summed_in_float32():
    x, ids, weights, w13, w2 = make_case(0, 16, 4, 8, 64, 48, dtype=torch.bfloat16)
    plan = plan_pairs(ids, weights, np.arange(8))
    ours = grouped_experts(x, plan, w13, w2, expert_views(w13, w2))
    assert ours.dtype == torch.bfloat16
    expected = grouped_experts_reference(x.float(), plan, w13.float(), w2.float())
    torch.testing.assert_close(ours.float(), expected, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("num_workers", [2, 3])
def test_the_shares_of_workers_sum_to_the_whole(num_workers):
    x, ids, weights, w13, w2 = make_case(1, 12, 3, 7, 32, 24, absent=0.0)
    whole = grouped_experts(x, plan_pairs(ids, weights, np.arange(7)), w13, w2)
    total = torch.zeros_like(whole)
    for worker in range(num_workers):
        here = np.arange(worker, 7, num_workers)
        local_index = np.full(7, -1, np.int64)
        local_index[here] = np.arange(len(here))
        total += grouped_experts(x, plan_pairs(ids, weights, local_index), w13[here], w2[here])
    torch.testing.assert_close(total, whole, atol=1e-5, rtol=1e-5)


def test_a_token_without_pairs_gives_exact_zeros_even_beside_a_broken_one():
    x, ids, weights, w13, w2 = make_case(2, 4, 2, 4, 16, 8, absent=0.0)
    ids[1] = -1
    x[2] = float("nan")
    out = grouped_experts(x, plan_pairs(ids, weights, np.arange(4)), w13, w2)
    assert torch.equal(out[1], torch.zeros(16))
    assert out[0].isfinite().all()
    assert out[3].isfinite().all()
    assert out[2].isnan().all()

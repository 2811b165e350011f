"""`plan_pairs` against its loop-written oracle."""

from __future__ import annotations

import sys

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from amoe.kernels.permute import PairPlan, plan_pairs, plan_pairs_reference


@st.composite
def pairs(draw):
    num_tokens, top_k = draw(st.integers(0, 12)), draw(st.integers(1, 5))
    num_experts = draw(st.integers(top_k, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = np.stack([rng.permutation(num_experts)[:top_k] for _ in range(num_tokens)] or [np.zeros(top_k, int)])
    ids = ids[:num_tokens].astype(np.int16)
    ids[rng.random(ids.shape) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -1
    here = np.flatnonzero(rng.random(num_experts) < draw(st.sampled_from([0.0, 0.5, 1.0])))
    local_index = np.full(num_experts, -1, np.int64)
    local_index[here] = np.arange(len(here))
    return ids, rng.random(ids.shape, np.float32), local_index


def assert_same(left: PairPlan, right: PairPlan) -> None:
    for name in PairPlan.__slots__:
        ours, expected = getattr(left, name), getattr(right, name)
        np.testing.assert_array_equal(ours, expected, err_msg=name)
        if isinstance(expected, np.ndarray):
            assert ours.dtype == expected.dtype, name


@settings(max_examples=200, deadline=None)
@given(pairs())
def test_equals_the_oracle(case):
    assert_same(plan_pairs(*case), plan_pairs_reference(*case))


@settings(max_examples=50, deadline=None)
@given(pairs())
def test_wide_and_strided_ids_are_the_same(case):
    ids, weights, local_index = case
    wide = np.full((len(ids), ids.shape[1] * 2), 77, np.int64)
    wide[:, ::2] = ids
    assert_same(plan_pairs(wide[:, ::2], weights, local_index), plan_pairs(ids, weights, local_index))


def test_offsets_bound_each_experts_pairs():
    ids = np.array([[0, 2], [2, -1], [0, 2]], np.int16)
    plan = plan_pairs(ids, np.ones((3, 2), np.float32), np.array([1, -1, 0]))
    assert plan.experts == [0, 1]
    assert plan.offsets == [0, 3, 5]
    assert plan.token_rows.tolist() == [0, 1, 2, 0, 2]


def test_the_plan_owns_its_arrays():
    """Ids and weights are views of a receive buffer: read-only, and overwritten by the next message."""
    ids, weights = np.array([[1, 0]], np.int16), np.array([[0.25, 0.75]], np.float32)
    ids.flags.writeable = False
    plan = plan_pairs(ids, weights, np.arange(2))
    weights[:] = 0
    assert plan.pair_weights.tolist() == [0.25, 0.75]
    assert all(getattr(plan, name).flags.writeable for name in ("token_rows", "pair_positions", "token_offsets"))


def test_more_tokens_take_no_more_calls():
    """A loop over tokens would be felt at every step; how long a call takes depends on what else the machine does."""

    def num_calls(num_tokens: int) -> int:
        rng = np.random.default_rng(0)
        ids = np.stack([rng.permutation(64)[:8] for _ in range(num_tokens)]).astype(np.int16)
        weights, local_index = rng.random((num_tokens, 8), np.float32), np.arange(64)
        calls = []
        sys.setprofile(lambda frame, event, what: calls.append(event) if event in ("call", "c_call") else None)
        try:
            plan_pairs(ids, weights, local_index)
        finally:
            sys.setprofile(None)
        return len(calls)

    assert num_calls(16) == num_calls(256) < 100

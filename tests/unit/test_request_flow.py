"""Tokens and latencies of the last minutes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoe.stats import LATENCY_EDGES, RequestFlow, latency_quantile


def test_samples_are_cumulative_and_about_a_second_apart():
    flow = RequestFlow()
    flow.mark(10.0)
    flow.first_token(0.05, 7)
    flow.tokens(1, None)
    flow.tokens(2, 0.02)
    for at in (10.5, 11.0, 11.5, 12.0):
        flow.mark(at)
    assert [sample.at_s for sample in flow.samples] == [10.0, 11.0, 12.0]
    first, last = flow.samples[0], flow.samples[-1]
    assert (first.prompt_tokens, first.generated_tokens) == (0, 0)
    assert (last.prompt_tokens, last.generated_tokens) == (7, 3)
    assert (last.ttft.sum(), last.itl.sum()) == (1, 1)


def test_memory_is_bounded():
    flow = RequestFlow()
    for second in range(2 * RequestFlow.MEMORY):
        flow.mark(float(second))
    assert len(flow.samples) == RequestFlow.MEMORY
    assert flow.samples[-1].at_s == 2 * RequestFlow.MEMORY - 1


@given(st.lists(st.floats(2e-4, 900.0), min_size=1, max_size=200), st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]))
def test_quantiles_are_right_to_a_bucket(values: list[float], q: float):
    flow = RequestFlow()
    for value in values:
        flow.first_token(value, 1)
    found = latency_quantile(flow.now(0.0).ttft, q)
    exact = float(np.quantile(values, q, method="inverted_cdf"))
    width = LATENCY_EDGES[1] / LATENCY_EDGES[0]
    assert found is not None and exact / width * 0.999 <= found <= exact * width * 1.001


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 1e9])
def test_what_lies_outside_counts_at_the_border(seconds: float):
    flow = RequestFlow()
    flow.tokens(1, seconds)
    found = latency_quantile(flow.now(0.0).itl, 0.5)
    assert found in (pytest.approx(LATENCY_EDGES[0]), pytest.approx(LATENCY_EDGES[-1]))


def test_nothing_has_no_quantile():
    assert latency_quantile(RequestFlow().now(0.0).itl, 0.5) is None

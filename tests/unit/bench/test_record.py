"""Statistics of a run against a naive computation."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoe.bench.record import INTERRUPTED, Latency, RequestRecord, summarise

seconds = st.floats(0, 1000, allow_nan=False)


def naive_percentile(values, percent):
    """Linear interpolation between closest ranks."""
    values = sorted(values)
    position = (len(values) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(values) - 1)
    return values[below] + (values[above] - values[below]) * (position - below)


@given(st.lists(seconds, min_size=1, max_size=50))
def test_latency_equals_a_naive_computation(values):
    latency = Latency.of_seconds([*values, float("nan")])
    assert latency.count == len(values)
    assert latency.mean == pytest.approx(statistics.fmean(values) * 1e3)
    assert latency.max == max(values) * 1e3
    for percent, value in ((50, latency.p50), (90, latency.p90), (99, latency.p99)):
        assert value == pytest.approx(naive_percentile(values, percent) * 1e3)


def test_no_observation_is_nan():
    latency = Latency.of_seconds([])
    assert latency.count == 0
    assert math.isnan(latency.p50)


def test_a_request():
    record = RequestRecord(10.0, finished_at=14.0, arrivals=[11.0, 12.0, 13.5], tokens=[1, 1, 3])
    assert record.time_to_first_token == 1.0
    assert record.time_per_output_token == 2.5 / 4
    assert record.inter_token_latencies.tolist() == [1.0, 0.5, 0.5, 0.5]


def test_requests_of_one_token_or_none():
    one = RequestRecord(0.0, arrivals=[1.0], tokens=[1])
    assert math.isnan(one.time_per_output_token)
    assert one.inter_token_latencies.tolist() == []
    assert math.isnan(RequestRecord(0.0).time_to_first_token)


@given(st.lists(st.lists(st.tuples(st.floats(0.001, 5), st.integers(1, 4)), max_size=6), max_size=6))
def test_itl_weighs_tokens_and_tpot_weighs_requests(pieces):
    records = []
    for steps in pieces:
        record = RequestRecord(0.0)
        for gap, count in steps:
            record.arrivals.append((record.arrivals or [0.0])[-1] + gap)
            record.tokens.append(count)
        record.output_tokens = sum(record.tokens)
        record.finished_at = (record.arrivals or [0.0])[-1]
        records.append(record)
    figures = summarise(records)
    gaps = [gap / count for steps in pieces for gap, count in steps[1:] for _ in range(count)]
    assert figures.inter_token_latency.count == len(gaps)
    if gaps:
        assert figures.inter_token_latency.mean == pytest.approx(statistics.fmean(gaps) * 1e3, rel=1e-6)
    per_token = [sum(g for g, _ in s[1:]) / sum(c for _, c in s[1:]) for s in pieces if len(s) > 1]
    assert figures.time_per_output_token.count == len(per_token)
    if per_token:
        assert figures.time_per_output_token.mean == pytest.approx(statistics.fmean(per_token) * 1e3, rel=1e-6)


def test_a_run_counts_only_what_is_complete():
    records = [
        RequestRecord(1.0, 3.0, [2.0], [4], prompt_tokens=10, output_tokens=4, requested_tokens=4),
        RequestRecord(1.5, 5.0, [2.0, 4.0], [1, 1], prompt_tokens=20, output_tokens=2, requested_tokens=4),
        RequestRecord(2.0, 2.5, failure="HTTP 503: full"),
        RequestRecord(2.0, 2.5, failure="HTTP 503: full"),
        RequestRecord(2.0, 6.0, failure="ReadError", prompt_tokens=5, output_tokens=1),
        RequestRecord(3.0, 4.0, failure=INTERRUPTED),
    ]
    figures = summarise(records)
    assert (figures.completed, figures.failed, figures.interrupted, figures.short) == (2, 3, 1, 1)
    assert figures.failures == {"HTTP 503: full": 2, "ReadError": 1}
    assert (figures.prompt_tokens, figures.output_tokens) == (30, 6)
    assert figures.duration_s == 5.0
    assert figures.output_tokens_per_s == 6 / 5
    assert figures.total_tokens_per_s == 36 / 5
    assert figures.requests_per_s == 2 / 5
    assert figures.mean_concurrency == (2 + 3.5 + 0.5 + 0.5 + 4 + 1) / 5
    assert figures.time_to_first_token.count == 2


def test_an_empty_run():
    figures = summarise([])
    assert figures.completed == 0
    assert figures.output_tokens_per_s == 0

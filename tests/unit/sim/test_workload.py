"""Lengths and requests, and configurations that make no sense."""

from __future__ import annotations

import numpy as np
import pytest

from amoe.config import PlacementConfig
from amoe.errors import ConfigError
from amoe.sim.config import HostModel, Outage, Slowdown, Window
from amoe.sim.workload import Lengths, RequestSource, Workload
from tests.unit.sim.cases import make_config


def draw(lengths: Lengths, count: int = 4000) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.array([lengths.draw(rng) for _ in range(count)])


def test_fixed_lengths():
    assert set(draw(Lengths(mean=7)).tolist()) == {7}
    assert set(draw(Lengths(mean=7, kind="uniform")).tolist()) == {7}


def test_uniform_lengths():
    drawn = draw(Lengths(mean=20, kind="uniform", spread=0.5))
    assert (drawn.min(), drawn.max(), Lengths(mean=20, kind="uniform", spread=0.5).longest) == (10, 30, 30)
    assert drawn.mean() == pytest.approx(20, rel=0.02)


def test_log_normal_lengths():
    lengths = Lengths(mean=100, kind="lognormal", spread=1.0)
    drawn = draw(lengths)
    assert drawn.mean() == pytest.approx(100, rel=0.1)
    assert np.log(drawn).std() == pytest.approx(1.0, rel=0.1)
    assert 1 <= drawn.min() < drawn.max() <= lengths.longest == 800


def test_requests_are_numbered_and_end():
    workload = Workload(concurrency=2, num_requests=3, input=Lengths(mean=5), output=Lengths(mean=4))
    source = RequestSource(workload, 50, np.random.default_rng(0))
    requests = []
    while not source.is_empty:
        requests.append(source.draw())
    assert [request.request_id for request in requests] == [0, 1, 2]
    for request in requests:
        assert request.params.max_tokens == 4
        assert len(request.prompt_token_ids) == 5
        assert 0 <= request.prompt_token_ids.min() <= request.prompt_token_ids.max() < 50


def test_staggered_sequences_are_under_way():
    workload = Workload(concurrency=100, output=Lengths(mean=40), stagger=True)
    source = RequestSource(workload, 50, np.random.default_rng(0))
    first = [source.draw().params.max_tokens for _ in range(100)]
    assert min(first) < 8 < 32 < max(first) <= 40
    assert source.draw().params.max_tokens == 40


def test_arrivals_have_the_rate_asked_for():
    source = RequestSource(Workload(request_rate=20.0), 50, np.random.default_rng(0))
    assert np.mean([source.next_gap() for _ in range(4000)]) == pytest.approx(1 / 20, rel=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Lengths(mean=0), "at least 1"),
        (lambda: Lengths(mean=1, kind="uniform", spread=1.5), "spread of uniform"),
        (lambda: Lengths(mean=1, kind="gamma"), "not 'gamma'"),
        (lambda: Workload(), "either a concurrency or a request rate"),
        (lambda: Workload(concurrency=1, request_rate=1.0), "either a concurrency or a request rate"),
        (lambda: Workload(concurrency=0), "concurrency must be at least 1"),
        (lambda: Workload(request_rate=0.0), "rate must be greater than 0"),
        (lambda: Workload(concurrency=1, num_requests=0), "number of requests"),
        (lambda: Workload(concurrency=1, context_offset=-1), "context_offset"),
        (lambda: HostModel(seconds=-1.0), "host time"),
        (lambda: HostModel(mode="magic"), "not 'magic'"),
        (lambda: Slowdown(rank=0, factor=0.0), "factor greater than 0"),
        (lambda: Outage(rank=0, start_s=2.0, end_s=1.0), "end after"),
        (lambda: Window(length=0.0), "length greater than 0"),
        (lambda: Window(unit="tokens"), "not 'tokens'"),
        (lambda: make_config(slowdowns=(Slowdown(rank=1, factor=2.0),)), "no worker 1: ranks go from 0 to 0"),
        (lambda: make_config(outages=(Outage(rank=7, start_s=1.0),)), "no worker 7"),
        (lambda: make_config(max_model_len=30), "sequences of up to 35 tokens"),
        (lambda: make_config(workload=Workload(concurrency=1)), "length of the measurement"),
        (
            lambda: make_config(workload=Workload(request_rate=1.0), window=Window(length=1, unit="iterations")),
            "only a closed loop",
        ),
        (lambda: make_config(placement=PlacementConfig(colocated=9)), "more expert workers than the 8 experts"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()

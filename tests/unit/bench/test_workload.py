"""Lengths, prompts and arrivals."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoe.bench.workload import (
    LengthRange,
    make_requests,
    poisson_arrivals,
    random_prompts,
    standard_library_text,
    text_prompts,
)
from amoe.errors import ConfigError


def rng(seed=0):
    return np.random.default_rng(seed)


@given(st.integers(1, 5000), st.floats(0, 1))
def test_lengths_keep_their_bounds(mean, ratio):
    lengths = LengthRange(mean=mean, ratio=ratio).draw(rng(), 200)
    low, high = LengthRange(mean=mean, ratio=ratio).bounds
    assert 1 <= low <= lengths.min() <= lengths.max() <= high
    assert abs(high - mean * (1 + ratio)) <= 0.5
    assert low == 1 or abs(low - mean * (1 - ratio)) <= 0.5


def test_lengths_reach_both_bounds():
    lengths = LengthRange(mean=10, ratio=0.2).draw(rng(), 500)
    assert set(lengths.tolist()) == {8, 9, 10, 11, 12}


@pytest.mark.parametrize(("mean", "ratio"), [(0, 0.0), (5, -0.1), (5, 1.1)])
def test_impossible_lengths_are_refused(mean, ratio):
    with pytest.raises(ConfigError):
        LengthRange(mean=mean, ratio=ratio)


def test_arrivals_are_a_poisson_process():
    arrivals = poisson_arrivals(rng(), 20_000, rate=5.0)
    gaps = np.diff(arrivals)
    assert arrivals[0] == 0
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(0.2, rel=0.03)
    assert gaps.std() == pytest.approx(0.2, rel=0.05)  # exponential: deviation equals mean
    assert np.median(gaps) == pytest.approx(0.2 * np.log(2), rel=0.05)


def test_arrivals_of_few_requests():
    assert poisson_arrivals(rng(), 0, 1.0).tolist() == []
    assert poisson_arrivals(rng(), 1, 1.0).tolist() == [0.0]
    with pytest.raises(ConfigError, match="--request-rate"):
        poisson_arrivals(rng(), 1, 0.0)


def test_the_seed_decides_everything():
    def workload(seed):
        source = rng(seed)
        lengths = LengthRange(mean=8, ratio=0.5).draw(source, 5)
        requests = make_requests(random_prompts(source, lengths, 100), source, LengthRange(mean=4, ratio=0.5))
        return requests, poisson_arrivals(source, 5, 1.0).tolist()

    assert workload(1) == workload(1)
    assert workload(1) != workload(2)


def test_random_prompts_stay_in_the_vocabulary():
    prompts = random_prompts(rng(), np.asarray([3, 500]), vocab_size=7)
    assert [len(p) for p in prompts] == [3, 500]
    assert set(prompts[1]) == set(range(7))


def test_text_prompts_with_a_tokenizer_have_exact_lengths():
    text = "abc defgh " * 500
    prompts = text_prompts(rng(), np.asarray([1, 20, 100]), text, encode=lambda s: [len(w) for w in s.split()])
    assert [len(p) for p in prompts] == [1, 20, 100]


def test_text_prompts_without_a_tokenizer_are_windows_of_the_text():
    text = "".join(chr(97 + i % 26) for i in range(1000))
    (prompt,) = text_prompts(rng(), np.asarray([100]), text, encode=None)
    assert prompt in text
    assert len(prompt) == 350


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(ConfigError, match="too short"):
        text_prompts(rng(), np.asarray([100]), "short", encode=None)


def test_the_standard_library_is_text_enough():
    text = standard_library_text(rng(), 200_000)
    assert len(text) >= 200_000
    assert "def " in text
    assert text == standard_library_text(rng(), 200_000)
    with pytest.raises(ConfigError):
        standard_library_text(rng(), 10**10)

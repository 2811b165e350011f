"""Routing without a router: what is drawn is what was asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amoe.errors import ConfigError
from amoe.profiles.models import MODELS
from amoe.profiles.routing import (
    PUBLISHED_IMBALANCE,
    DriftingRouting,
    RecordedRouting,
    WeightedRouting,
    log_normal_routing,
    published_routing,
)

SIZES = replace(MODELS["olmoe-1b-7b"], num_layers=3)


def chosen_slowly(weights, top_k: int):
    """[E] chances to be among `top_k` drawn without replacement, by summing over all ordered draws."""
    chances = np.zeros(len(weights))

    def draw(probability: float, chosen: tuple[int, ...]) -> None:
        if len(chosen) == top_k:
            chances[list(chosen)] += probability
            return
        rest = weights.sum() - weights[list(chosen)].sum()
        for expert in set(range(len(weights))) - set(chosen):
            draw(probability * weights[expert] / rest, (*chosen, expert))

    draw(1.0, ())
    return chances


@st.composite
def routings(draw, max_experts: int = 6):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_experts = draw(st.integers(1, max_experts))
    weights = rng.lognormal(0, draw(st.sampled_from([0.0, 0.5, 2.0])), (2, num_experts))
    return WeightedRouting(weights, draw(st.integers(1, num_experts))), rng


@given(routings(max_experts=40), st.integers(0, 50))
def test_every_token_gets_different_experts(routing_rng, num_tokens):
    routing, rng = routing_rng
    drawn = routing.draw(rng, 1, num_tokens)
    assert drawn.shape == (num_tokens, routing.top_k)
    assert all(len(set(token)) == routing.top_k for token in drawn.tolist())
    assert ((drawn >= 0) & (drawn < routing.weights.shape[1])).all()


@settings(max_examples=25)
@given(routings())
def test_popularity_is_that_of_drawing_without_replacement(routing_rng):
    routing, _ = routing_rng
    popularity = routing.popularity()
    assert popularity.sum(axis=1) == pytest.approx(np.ones(2))
    for layer in range(2):
        exact = chosen_slowly(routing.weights[layer], routing.top_k) / routing.top_k
        assert popularity[layer] == pytest.approx(exact, abs=0.01)


@settings(max_examples=15)
@given(routings())
def test_draws_follow_the_popularity_and_the_weightier_comes_first(routing_rng):
    routing, rng = routing_rng
    drawn = routing.draw(rng, 0, 20_000)
    counts = np.bincount(drawn.ravel(), minlength=routing.weights.shape[1])
    assert counts / drawn.size == pytest.approx(routing.popularity()[0], abs=0.02)
    first = np.bincount(drawn[:, 0], minlength=routing.weights.shape[1]) / len(drawn)
    assert first == pytest.approx(routing.weights[0], abs=0.02)


@pytest.mark.parametrize("top_k", [1, 2, 8, 64])
def test_without_sigma_all_experts_are_equally_popular(top_k):
    popularity = log_normal_routing(replace(SIZES, top_k=top_k), 0.0, seed=3).popularity()
    assert popularity == pytest.approx(np.full((3, 64), 1 / 64), rel=0.01)


def test_layers_are_independent_or_all_the_same():
    plain, same = (log_normal_routing(SIZES, 1.0, 5, correlated=correlated).weights for correlated in (False, True))
    assert (same == same[0]).all()
    assert (same[0] == plain[0]).all()
    assert abs(np.corrcoef(np.log(plain[0]), np.log(plain[1]))[0, 1]) < 0.5
    assert np.log(plain).std() == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("name", ["olmoe-chat", "olmoe-code"])
def test_published_imbalance_is_reached(name):
    popularity = published_routing(SIZES, name, seed=1).popularity()
    assert (popularity.max(axis=1) * SIZES.num_experts).mean() == pytest.approx(PUBLISHED_IMBALANCE[name], rel=0.01)


def test_an_imbalance_beyond_what_sizes_allow_is_refused():
    with pytest.raises(ConfigError, match="E / K is the most"):
        published_routing(SIZES, "deepseek-r1-translation", seed=1)
    with pytest.raises(ConfigError, match="known: deepseek"):
        published_routing(SIZES, "nothing", seed=1)


def test_domains_follow_each_other_round_and_round():
    domains = [WeightedRouting(np.array([[1.0 + 99 * (expert == hot) for expert in range(3)]]), 1) for hot in range(3)]
    routing = DriftingRouting(domains, period_s=2.0)
    rng = np.random.default_rng(0)
    for now, hot in ((0.0, 0), (1.99, 0), (2.0, 1), (5.9, 2), (6.0, 0), (602.5, 1)):
        assert routing.popularity(now)[0].argmax() == hot
        assert np.bincount(routing.draw(rng, 0, 100, now)[:, 0]).argmax() == hot


def test_recorded_tokens_are_repeated():
    """Experts of one token stay together."""
    recorded = np.array([[[0, 1], [2, 3]], [[0, 4], [3, 2]], [[5, 1], [3, 4]]])
    routing = RecordedRouting(recorded, 8)
    rng = np.random.default_rng(0)
    for layer in range(2):
        drawn = {tuple(token) for token in routing.draw(rng, layer, 200).tolist()}
        assert drawn == {tuple(token) for token in recorded[:, layer].tolist()}
    assert routing.popularity()[0] == pytest.approx(np.array([2, 2, 0, 0, 1, 1, 0, 0]) / 6)
    assert routing.popularity()[1] == pytest.approx(np.array([0, 0, 2, 3, 1, 0, 0, 0]) / 6)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: WeightedRouting(np.array([[1.0, 0.0]]), 1),
        lambda: WeightedRouting(np.array([[1.0, np.inf]]), 1),
        lambda: WeightedRouting(np.ones((1, 4)), 5),
        lambda: WeightedRouting(np.ones((1, 4)), 0),
        lambda: log_normal_routing(SIZES, -0.1, 0),
        lambda: DriftingRouting([], 1.0),
        lambda: DriftingRouting([WeightedRouting(np.ones((1, 4)), 1)], 0.0),
        lambda: RecordedRouting(np.zeros((0, 1, 1), np.int64), 4),
        lambda: RecordedRouting(np.full((2, 1, 1), 4), 4),
    ],
)
def test_what_cannot_be_drawn_is_refused(wrong):
    with pytest.raises(ConfigError):
        wrong()

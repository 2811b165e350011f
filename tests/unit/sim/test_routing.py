"""Pools of drawn tokens."""

from __future__ import annotations

import numpy as np

from amoe.profiles.routing import log_normal_routing
from amoe.sim.routing import PooledRouting
from tests.unit.sim.cases import SIZES

ROUTING = log_normal_routing(SIZES, 1.0, seed=3)


def test_tokens_of_a_pool_are_those_of_the_model():
    pooled = PooledRouting(ROUTING, seed=1)
    drawn = pooled.draw(np.random.default_rng(0), 1, 50_000)
    assert drawn.shape == (50_000, SIZES.top_k)
    assert (drawn[:, 0] != drawn[:, 1]).all()
    shares = np.bincount(drawn.ravel(), minlength=SIZES.num_experts) / drawn.size
    assert np.abs(shares - ROUTING.popularity()[1]).max() < 0.02
    assert pooled.popularity() is ROUTING.popularity()


def test_a_pool_does_not_depend_on_what_was_asked_before():
    first, second = PooledRouting(ROUTING, seed=1), PooledRouting(ROUTING, seed=1)
    second.draw(np.random.default_rng(9), 2, 10)
    one, other = (pooled.draw(np.random.default_rng(0), 1, 100) for pooled in (first, second))
    assert (one == other).all()
    assert (one != PooledRouting(ROUTING, seed=2).draw(np.random.default_rng(0), 1, 100)).any()

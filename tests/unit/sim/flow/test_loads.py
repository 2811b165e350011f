"""What is simulated by counts: deployments, and how many tokens go where."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amoe.errors import ConfigError
from amoe.policy.placement import replicate_experts
from amoe.profiles.costs import RooflineCosts
from amoe.profiles.routing import log_normal_routing
from amoe.sim.flow.loads import Loads
from tests.unit.sim.flow.cases import make_deployment, plain_loads

MODES = ("primary", "even", "plan", "level-batch", "level-home")


@given(st.integers(1, 9), st.integers(0, 500), st.integers(1, 6), st.booleans(), st.integers(0, 99))
def test_sequences_are_divided_as_evenly_as_whole_numbers_are(num_homes, spare, num_waves, is_even, seed):
    deployment = make_deployment(num_devices=num_homes, num_sequences=num_homes + spare)
    shares = None if is_even else np.random.default_rng(seed).uniform(0.1, 2.0, num_homes)
    tokens = deployment.tokens(num_waves, shares)
    assert tokens.shape == (num_homes, num_waves)
    assert tokens.sum() == num_homes + spare
    assert (np.ptp(tokens, axis=1) <= 1).all()
    exact = np.full(num_homes, 1 / num_homes) if shares is None else shares / shares.sum()
    assert (np.abs(tokens.sum(axis=1) - exact * deployment.num_sequences) <= 1 + 1e-9).all()
    assert shares is not None or np.ptp(tokens.sum(axis=1)) <= 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_devices": 0},
        {"attention_devices": 4},
        {"attention_devices": -1},
        {"num_sequences": 3},
        {"context": -1},
        {"slow": {4: 2.0}},
        {"slow": {0: 0.0}},
    ],
    ids=str,
)
def test_deployments_that_cannot_be_are_refused(wrong):
    with pytest.raises(ConfigError):
        make_deployment(**wrong)


def test_homes_and_owners():
    colocated, apart = make_deployment(slow={1: 2.0}), make_deployment(attention_devices=1, slow={1: 2.0})
    assert (colocated.homes, colocated.owners, colocated.colocated) == (range(4), range(4), True)
    assert (apart.homes, apart.owners, apart.colocated) == (range(1), range(1, 4), False)
    assert colocated.owner_speed.tolist() == [1.0, 0.5, 1.0, 1.0]
    assert apart.owner_speed.tolist() == [0.5, 1.0, 1.0]


@settings(max_examples=40)
@given(st.sampled_from(MODES), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(0, 99))
def test_every_pair_is_computed_once(mode, num_waves, top_k, spare, seed):
    """Rows, seconds and activity of a layer are those of one division of all pairs among the replicas."""
    deployment = make_deployment(top_k=top_k, num_layers=2, slow={2: 1.5})
    popularity = log_normal_routing(deployment.sizes, 1.0, seed).popularity()
    owners = replicate_experts(popularity, 4, 2 + spare)
    tokens = deployment.tokens(num_waves)
    loads = Loads(deployment, popularity, owners, mode, tokens, seed=seed)
    load = loads.layer(0, 1)
    assert load.rows.shape == (4, num_waves, 4)
    assert load.seconds.shape == load.active.shape == (num_waves, 4)
    assert ((load.rows.sum(axis=0) > 0) == load.active).all()
    assert ((load.seconds > 0) == load.active).all()
    assert (load.rows.sum(axis=2) <= tokens * top_k + 1e-6).all()
    assert (load.rows.sum(axis=2) >= tokens * (1 - 1e-6)).all() or top_k > 1
    if top_k == 1:
        assert load.rows.sum(axis=2) == pytest.approx(tokens)
    device = RooflineCosts(deployment.sizes, deployment.device)
    computing = top_k * tokens.sum(axis=0) * 2 * deployment.sizes.expert_params / device.device.flops
    speed = deployment.owner_speed
    assert (load.seconds @ speed >= computing).all()  # splitting and reading only add


def test_seconds_are_the_roofline_of_what_all_homes_send():
    """One expert per owner: rows are its pairs."""
    loads = plain_loads(make_deployment(num_experts=4, slow={3: 2.0}), num_waves=2)
    costs = loads.deployment.costs()
    for layer in range(4):
        load = loads.layer(5, layer)
        for wave, owner in np.ndindex(2, 4):
            alone = float(costs.experts(layer, load.rows[:, wave, owner].sum(keepdims=True)))
            assert load.seconds[wave, owner] == pytest.approx(alone * (2.0 if owner == 3 else 1.0))


def test_attention_and_head_of_every_home_and_wave():
    loads = plain_loads(
        make_deployment(num_sequences=9, num_dense_layers=1, dense_intermediate_size=512, slow={1: 3.0}), 3
    )
    costs = loads.deployment.costs()
    assert loads.attention().shape == (4, 4, 3)
    for layer, home, wave in np.ndindex(4, 4, 3):
        count = int(loads.tokens[home, wave])
        factor = 3.0 if home == 1 else 1.0
        assert loads.attention()[layer, home, wave] == pytest.approx(
            factor * costs.attention(layer, count, 512 * count)
        )
        assert loads.head()[home, wave] == pytest.approx(factor * costs.head(count))
    assert (loads.tokens == 0).any()


def test_draws_repeat_and_do_not_depend_on_the_order_of_asking():
    first, second = plain_loads(make_deployment(), num_draws=3), plain_loads(make_deployment(), num_draws=6)
    asked = [(iteration, layer) for iteration in range(3) for layer in range(4)]
    for iteration, layer in asked[::-1]:
        second.layer(iteration, layer)
    for iteration, layer in asked:
        assert (first.layer(iteration, layer).rows == second.layer(iteration, layer).rows).all()
        assert first.layer(iteration, layer) is first.layer(iteration + 3, layer)
    assert (first.layer(0, 0).rows != first.layer(1, 0).rows).any()
    assert (first.layer(0, 0).rows != plain_loads(make_deployment(), seed=1).layer(0, 0).rows).any()


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (64, 8)])
def test_rows_are_nearly_those_of_tokens_with_different_experts(num_experts, top_k):
    """Counted for experts that are chosen independently: up to 6 % too few where there are only eight."""
    deployment = make_deployment(num_experts=num_experts, top_k=top_k, num_sequences=40_000)
    routing = log_normal_routing(deployment.sizes, 0.5, seed=1)
    drawn = routing.draw(np.random.default_rng(0), 0, 40_000)
    owners = drawn * 4 // num_experts
    exact = np.array([(owners == owner).any(axis=1).mean() for owner in range(4)])
    rows = plain_loads(deployment, sigma=0.5).layer(0, 0).rows[:, 0].sum(axis=0) / 40_000
    assert rows == pytest.approx(exact, rel=0.08)
    assert (rows <= exact * 1.01).all()


def test_expected_seconds_are_the_mean_of_the_draws():
    loads = plain_loads(make_deployment(num_sequences=40_000, num_dense_layers=1), num_waves=2, num_draws=4)
    drawn = np.mean([[loads.layer(i, layer).seconds.mean(axis=0) for layer in range(1, 4)] for i in range(4)], axis=0)
    assert loads.expected_seconds()[1:] == pytest.approx(drawn, rel=0.02)
    assert not loads.expected_seconds()[0].any()

"""Planned and levelled replicas: against slow oracles, brute force, and what must hold of any plan."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amoe.policy.placement import place_experts, replicate_experts
from amoe.policy.replicas import (
    even_shares,
    expert_seconds,
    home_shares,
    level,
    owner_seconds,
    plan_layers,
    plan_shares,
    primary_shares,
    split_counts,
)

PER_TOKEN = 1e-3


@st.composite
def layers(draw, max_owners: int = 6, max_experts: int = 20):
    """load [E], owners [E, R], reading_s, speed [D]."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_owners = draw(st.integers(1, max_owners))
    num_experts = draw(st.integers(num_owners, max(num_owners, max_experts)))
    slots = -(-num_experts // num_owners) + draw(st.integers(0, 4))
    load = rng.lognormal(0, draw(st.sampled_from([0.0, 1.5])), num_experts) * draw(st.sampled_from([1.0, 40.0]))
    load[rng.random(num_experts) < 0.1] = 0.0
    owners = replicate_experts(load[None], num_owners, slots, anchored=draw(st.booleans()))[0]
    speed = np.ones(num_owners) if draw(st.booleans()) else rng.uniform(0.4, 1.0, num_owners)
    return load, owners, draw(st.sampled_from([0.0, 0.01, 0.1])), speed


# ---- whole tokens


@given(layers(), st.lists(st.integers(0, 2000), min_size=2, max_size=2))
def test_split_counts_sum_up_and_sleep_where_there_is_no_share(layer, most):
    load, owners, _, _ = layer
    rng = np.random.default_rng(most[0])
    shares = np.where(owners >= 0, rng.random(owners.shape) * (rng.random(owners.shape) < 0.6), 0.0)
    shares[:, 0] += shares.sum(axis=1) == 0
    shares /= shares.sum(axis=1, keepdims=True)
    counts = rng.integers(0, max(most) + 1, (3, 2, len(load)))
    parts = split_counts(counts, shares, rng.random(counts.shape))
    assert (parts.sum(axis=-1) == counts).all()
    assert (parts >= 0).all()
    assert (parts[..., shares == 0] == 0).all()
    assert (np.abs(parts - counts[..., None] * shares) < 1 + 1e-6).all()


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5), st.integers(0, 30))
def test_over_all_phases_split_counts_have_the_exact_mean(weights, count):
    shares = np.array([weights]) / np.sum(weights)
    phases = (np.arange(2000) + 0.5) / 2000
    parts = split_counts(np.full((2000, 1), count), shares, phases[:, None])
    assert parts.mean(axis=0) == pytest.approx(count * shares, abs=2e-3)


# ---- plans


@given(layers())
def test_a_plan_is_never_worse_than_the_primaries_or_even_shares(layer):
    load, owners, reading, speed = layer
    shares = plan_shares(load, owners, PER_TOKEN, reading, speed)
    assert shares.sum(axis=1) == pytest.approx(np.ones(len(load)))
    assert (shares >= 0).all()
    assert (shares[owners < 0] == 0).all()

    def longest(chosen):
        return owner_seconds(load, owners, chosen, PER_TOKEN, reading, speed).max()

    others = min(longest(primary_shares(owners)), longest(even_shares(owners)))
    assert longest(shares) <= others * (1 + 1e-9)
    assert longest(shares) * speed.sum() >= expert_seconds(load, PER_TOKEN, reading).sum() * (1 - 1e-9)


@given(layers())
def test_owner_seconds_are_the_sum_over_what_an_owner_computes(layer):
    load, owners, reading, speed = layer
    shares = even_shares(owners)
    seconds = [0.0] * len(speed)
    for expert, replica in np.argwhere(owners >= 0).tolist():
        tokens = load[expert] * shares[expert, replica]
        if tokens:
            owner = owners[expert, replica]
            seconds[owner] += max(tokens * PER_TOKEN, reading) / speed[owner]
    assert owner_seconds(load, owners, shares, PER_TOKEN, reading, speed) == pytest.approx(np.array(seconds))


def best_by_grid(load, owners, reading, speed, steps: int = 20) -> float:
    """The shortest longest time, over a grid of shares."""
    choices = []
    for places in owners:
        width = int((places >= 0).sum())
        parts = [cut for cut in itertools.product(range(steps + 1), repeat=width) if sum(cut) == steps]
        choices.append([np.pad(np.array(cut) / steps, (0, owners.shape[1] - width)) for cut in parts])
    return min(
        owner_seconds(load, owners, np.stack(shares), PER_TOKEN, reading, speed).max()
        for shares in itertools.product(*choices)
    )


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.01, 0.05]), st.booleans())
def test_tiny_plans_are_near_the_best_of_a_grid(seed, reading, is_even):
    """Two replicated experts and a third one on three owners."""
    rng = np.random.default_rng(seed)
    owners = np.array([[0, 1], [1, 2], [rng.integers(3), -1]], np.int16)
    load, speed = rng.uniform(1, 60, 3), np.ones(3) if is_even else rng.uniform(0.4, 1.0, 3)
    shares = plan_shares(load, owners, PER_TOKEN, reading, speed)
    longest = owner_seconds(load, owners, shares, PER_TOKEN, reading, speed).max()
    assert longest <= best_by_grid(load, owners, reading, speed) * 1.02


def test_below_the_ridge_one_replica_sleeps():
    """Two would read the expert twice, and take as long as one."""
    owners = np.array([[0, 1], [1, -1]], np.int16)
    shares = plan_shares(np.array([10.0, 1.0]), owners, PER_TOKEN, 0.05, np.ones(2))
    assert shares.tolist() == [[1.0, 0.0], [1.0, 0.0]]


@given(layers(max_owners=4, max_experts=8), st.integers(1, 3))
def test_coupled_layers_are_planned_for_the_sum(layer, num_passes):
    load, owners, reading, speed = layer
    rng = np.random.default_rng(1)
    loads = np.stack([rng.permutation(load) for _ in range(4)])
    where = np.stack([owners] * 4)
    alone = plan_layers(loads, where, PER_TOKEN, reading, speed)
    for i in range(4):
        assert (alone[i] == plan_shares(loads[i], where[i], PER_TOKEN, reading, speed)).all()
    coupled = plan_layers(loads, where, PER_TOKEN, reading, speed, 0.1, num_passes)
    assert coupled.sum(axis=-1) == pytest.approx(np.ones(loads.shape))
    assert (coupled[where < 0] == 0).all()


# ---- water


def pour_slowly(levels, amount: float, cost):
    """Tokens [m] of each vessel: the surface is found by bisection."""
    low, high = levels.min(), levels.max() + amount * cost.max()
    for _ in range(200):
        middle = (low + high) / 2
        poured = (np.maximum(middle - levels, 0) / cost).sum()
        low, high = (middle, high) if poured < amount else (low, middle)
    return np.maximum(high - levels, 0) / cost


@given(st.integers(0, 2**32), st.integers(2, 6), st.sampled_from([0.0, 1.0, 7.0, 5000.0]))
def test_one_expert_is_poured_as_water_finds_its_level(seed, num_owners, amount):
    rng = np.random.default_rng(seed)
    waiting, speed = rng.choice([0.0, 1e-3, *rng.random(3)], num_owners), rng.uniform(0.3, 1.0, num_owners)
    owners = rng.permutation(num_owners)[None].astype(np.int16)
    parts = level(np.array([amount]), owners, waiting, PER_TOKEN, speed)
    places = owners[0]
    expected = pour_slowly(waiting[places], amount, PER_TOKEN / speed[places])
    assert parts[0] == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert parts.sum() == pytest.approx(amount)


@given(layers(), st.integers(0, 2**32))
def test_levelled_counts_sum_up_and_wake_nobody_by_rounding(layer, seed):
    load, owners, _, speed = layer
    rng = np.random.default_rng(seed)
    counts = rng.poisson(load, (3, 2, len(load))).astype(np.float64)
    waiting = rng.random((3, 2, len(speed))) * rng.integers(2)
    parts = level(counts, owners, waiting, PER_TOKEN, speed)
    assert parts.sum(axis=-1) == pytest.approx(counts, rel=1e-6)
    assert (parts[..., owners < 0] == 0).all()
    assert ((parts == 0) | (parts > 1e-9)).all()
    assert (parts[counts == 0] == 0).all()
    one = level(counts[1, 1], owners, waiting[1, 1], PER_TOKEN, speed)
    assert one.sum(axis=-1) == pytest.approx(counts[1, 1])


@settings(max_examples=40)
@given(layers(max_owners=3, max_experts=4))
def test_levelling_is_near_the_least_that_confinement_allows(layer):
    """No levelling beats (tokens that only a set of owners can take) / (their speed), and the best reaches it."""
    load, owners, _, speed = layer
    parts = level(load, owners, np.zeros(len(speed)), PER_TOKEN, speed, num_passes=30)
    busy = owner_seconds(load, owners, parts / np.maximum(load, 1e-12)[:, None], PER_TOKEN, 0.0, speed)
    least = 0.0
    for size in range(1, len(speed) + 1):
        for chosen in itertools.combinations(range(len(speed)), size):
            inside = [expert for expert, places in enumerate(owners) if {*places[places >= 0].tolist()} <= {*chosen}]
            least = max(least, load[inside].sum() * PER_TOKEN / speed[list(chosen)].sum())
    assert least * (1 - 1e-9) <= busy.max() <= least * 1.05 + 1e-12


# ---- homes


@given(st.integers(0, 2**32), st.integers(1, 8), st.integers(8, 4000))
def test_homes_are_level_but_for_those_that_get_the_least(seed, num_homes, num_sequences):
    rng = np.random.default_rng(seed)
    elsewhere, cost = rng.random(num_homes) * 1e-2, rng.uniform(1e-6, 4e-6, num_homes)
    shares = home_shares(elsewhere, cost, num_sequences)
    assert shares.sum() == pytest.approx(1.0)
    least = 0.25 / num_homes
    assert (shares >= least * (1 - 1e-9)).all()
    busy = elsewhere + shares * num_sequences * cost
    free = shares > least * (1 + 1e-6)
    assert busy[free] == pytest.approx(np.full(free.sum(), busy[free].max()), rel=1e-6)
    assert (busy[~free] >= busy[free].max() * (1 - 1e-6)).all()


def test_a_slow_home_gets_fewer_sequences():
    assert home_shares(np.zeros(3), np.array([1e-3, 1e-3, 2e-3]), 100) == pytest.approx(np.array([0.4, 0.4, 0.2]))


# ---- where replicas are


@given(st.integers(0, 2**32), st.integers(1, 8), st.integers(0, 6), st.booleans(), st.data())
def test_replicas_keep_their_promises(seed, num_owners, spare, anchored, data):
    num_experts = data.draw(st.integers(num_owners, 40))
    load = np.random.default_rng(seed).lognormal(0, 1.5, (3, num_experts))
    slots = -(-num_experts // num_owners) + spare
    owners = replicate_experts(load, num_owners, slots, anchored=anchored)
    even = np.bincount(place_experts(1, num_experts, num_owners)[0, :, 0], minlength=num_owners)
    for layer in owners:
        assert (layer[:, 0] >= 0).all()  # every expert lives somewhere
        for places in layer.tolist():
            there = [owner for owner in places if owner >= 0]
            assert len(set(there)) == len(there)
            assert places[: len(there)] == there
        held = np.bincount(layer[layer >= 0], minlength=num_owners)
        assert (held <= min(slots, num_experts)).all()
        if anchored:
            assert (np.bincount(layer[:, 0], minlength=num_owners) == even).all()


@pytest.mark.parametrize(("num_owners", "slots"), [(8, 33), (32, 9), (64, 5), (128, 3), (256, 2)])
def test_anchored_replicas_are_as_level_as_packed_ones(num_owners, slots):
    """Evenly divided among replicas, on average over layers: an even spread of first replicas costs nothing."""
    load = np.random.default_rng(7).lognormal(0, 1.25, (6, 256))

    def imbalance(anchored: bool) -> float:
        owners = replicate_experts(load, num_owners, slots, anchored=anchored)
        parts = load / (owners >= 0).sum(axis=-1)
        busy = np.zeros((len(load), num_owners))
        layer, expert, copy = np.nonzero(owners >= 0)
        np.add.at(busy, (layer, owners[layer, expert, copy]), parts[layer, expert])
        return float((busy.max(axis=1) / busy.mean(axis=1)).mean())

    assert imbalance(anchored=True) <= 1.02 * imbalance(anchored=False)


@given(st.integers(0, 2**32), st.integers(2, 6), st.integers(1, 4), st.booleans())
def test_planned_replicas_level_what_plain_placement_cannot(seed, num_owners, spare, anchored):
    """With tokens that dominate. A little more is possible where the plain placement happens to be lucky."""
    num_experts = 4 * num_owners
    load = np.random.default_rng(seed).lognormal(0, 1.0, num_experts)
    speed = np.ones(num_owners)
    plain = place_experts(1, num_experts, num_owners)[0]
    owners = replicate_experts(load[None], num_owners, 4 + spare, anchored=anchored)[0]
    before = owner_seconds(load, plain, primary_shares(plain), PER_TOKEN, 0.0, speed).max()
    shares = plan_shares(load, owners, PER_TOKEN, 0.0, speed)
    after = owner_seconds(load, owners, shares, PER_TOKEN, 0.0, speed).max()
    assert after <= before * 1.01

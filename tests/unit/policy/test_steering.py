"""Plans from measurements: always valid, on the right side, and not for every tremor."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoe.policy.placement import replicate_experts
from amoe.policy.replicas import owner_seconds, primary_shares
from amoe.policy.steering import (
    MAX_SPEED_RATIO,
    MIN_GAIN,
    Measured,
    ReplicaPlan,
    count_work,
    imbalance,
    lasting_speeds,
    moved_part,
    owner_speeds,
    plan_homes,
    plan_replicas,
)

RIDGE = 8


@st.composite
def clusters(draw):
    """Loads [L, E], owners [L, E, R] and speeds [D]."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_owners = draw(st.integers(2, 5))
    num_experts = draw(st.integers(num_owners, 16))
    load = rng.lognormal(0, 1.25, (2, num_experts)) * draw(st.sampled_from([0.5, 20.0, 1000.0]))
    owners = replicate_experts(load, num_owners, -(-num_experts // num_owners) + draw(st.integers(1, 4)))
    return load, owners, rng.choice([1.0, 1.0, 0.5, 0.67], num_owners)


def busy_of(load, owners, shares, speed):
    """[D] seconds of each owner over all layers."""
    layers = range(len(load))
    return sum(owner_seconds(load[i], owners[i], shares[i], 1.0, RIDGE, speed) for i in layers)


def plan_of(load, owners, speed, coupling=0.0):
    return plan_replicas(load, owners, RIDGE, speed, ReplicaPlan(primary_shares(owners)), coupling)


@given(clusters(), st.sampled_from([0.0, 0.05]))
def test_shares_are_shares_and_no_worse_than_before(cluster, coupling):
    load, owners, speed = cluster
    plan = plan_of(load, owners, speed, coupling)
    assert np.allclose(plan.shares.sum(axis=-1), 1)
    assert (plan.shares >= 0).all()
    assert (plan.shares[owners < 0] == 0).all()
    before = imbalance(load, owners, primary_shares(owners), RIDGE, speed)
    after = imbalance(load, owners, plan.shares, RIDGE, speed)
    assert after <= before
    assert plan.imbalance == pytest.approx(after if after > 1 / (1 - MIN_GAIN) else 1.0, rel=MIN_GAIN * 1.1)


@given(clusters())
def test_a_plan_is_kept_while_it_does_what_was_hoped(cluster):
    load, owners, speed = cluster
    plan = plan_of(load, owners, speed)
    assert plan_replicas(load, owners, RIDGE, speed, plan, 0.0) is plan
    shaken = load * np.random.default_rng(0).uniform(0.995, 1.005, load.shape)
    assert plan_replicas(shaken, owners, RIDGE, speed, plan, 0.0) is plan


@given(st.integers(2, 5), st.data())
def test_the_slowest_owner_gets_least(num_owners, data):
    """Where every expert lives everywhere, and is hot."""
    slow, factor = data.draw(st.integers(0, num_owners - 1)), data.draw(st.floats(0.3, 0.8))
    speed = np.ones(num_owners)
    speed[slow] = factor
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    load = rng.uniform(50, 150, (2, 3 * num_owners)) * RIDGE
    owners = replicate_experts(load, num_owners, 3 * num_owners)
    shares = plan_of(load, owners, speed).shares
    tokens = [float((load[..., None] * np.where(owners == owner, shares, 0)).sum()) for owner in range(num_owners)]
    assert min(tokens) == tokens[slow]
    busy = busy_of(load, owners, shares, speed)
    assert busy.max() <= 1.1 * busy.min()


def test_a_slower_owner_gets_less():
    load = np.full((3, 8), 100.0)
    owners = replicate_experts(load, 4, 4)
    even = plan_of(load, owners, np.ones(4))
    plan = plan_of(load, owners, np.array([1.0, 1.0, 0.5, 1.0]))
    work = [
        sum(float((load * np.where(owners[..., r] == owner, plan.shares[..., r], 0)).sum()) for r in range(2))
        for owner in range(4)
    ]
    assert work[2] < 0.8 * min(work[0], work[1], work[3])
    assert (even.shares == primary_shares(owners)).all(), "nothing moves where all is level"
    assert moved_part(load, even.shares) == 0.0
    assert 0.0 < moved_part(load, plan.shares) < 0.5


def test_a_hot_expert_is_shared():
    load = np.full((1, 4), 10.0)
    load[0, 0] = 100.0
    owners = replicate_experts(load, 4, 2)
    plan = plan_of(load, owners, np.ones(4))
    assert (plan.shares[0, 0] > 0).sum() > 1
    assert busy_of(load, owners, plan.shares, np.ones(4)).max() < 60
    assert plan_of(load / 100, owners, np.ones(4)).shares[0, 0, 0] == 1.0, "below the ridge a replica only costs"


AMOUNTS = st.just(0.0) | st.floats(1e-3, 1e6)


@given(st.lists(st.tuples(AMOUNTS, AMOUNTS), min_size=1, max_size=8))
def test_speeds_are_relative_and_bounded(pairs):
    work, seconds = np.array(pairs).T
    speed = owner_speeds(work, seconds)
    assert ((speed >= 1 / MAX_SPEED_RATIO) & (speed <= MAX_SPEED_RATIO)).all()
    assert (speed[(work == 0) | (seconds == 0)] == 1).all()


def test_speed_is_work_per_second():
    speed = owner_speeds(np.array([100.0, 300.0, 100.0, 0.0]), np.array([1.0, 3.0, 1.5, 0.0]))
    assert speed == pytest.approx([1, 1, 2 / 3, 1])
    assert count_work(np.array([0, 1, 3, 50]), 8) == 8 + 8 + 50


def measured(home_s, elsewhere_s, tokens=(1000.0, 1000.0, 1000.0)):
    return Measured(
        pairs=np.full((2, 4), 100.0),
        work=np.ones(3),
        expert_s=np.ones(3),
        tokens=np.array(tokens),
        home_s=np.array(home_s),
        elsewhere_s=np.array(elsewhere_s),
        tokens_per_batch=30.0,
    )


def settle(cluster, shares, is_sequential=False, turns=40):
    """Apply plans until they change nothing; `cluster(shares)` says what is measured then."""
    for _ in range(turns):
        shares = plan_homes(cluster(shares), shares, is_sequential=is_sequential)
        assert shares.sum() == pytest.approx(1)
        assert (shares > 0).all()
    return shares


@given(
    st.lists(st.floats(0.5, 2), min_size=3, max_size=3),
    st.lists(st.floats(0, 5), min_size=3, max_size=3),
    st.floats(0, 3),
)
def test_devices_become_equally_busy(slowness, experts, fixed):
    """Attention costs something per step, too, which the plan does not know apart."""
    slow, tokens = np.array(slowness), 3000.0

    def cluster(shares):
        return measured(slow * (fixed + 10 * shares), slow * np.array(experts), shares * tokens)

    shares = settle(cluster, np.full(3, 1 / 3))
    busy = slow * (fixed + 10 * shares + np.array(experts))
    free = shares > 1.2 * 0.25 / 3  # the others are at the least share that anybody gets, or as good as
    assert busy[free].max() <= 1.15 * busy[free].min()


def test_hot_experts_and_slow_devices_get_fewer_sequences():
    even = np.full(3, 1 / 3)
    hot = plan_homes(measured([1, 1, 1], [2.0, 1.0, 1.0]), even, is_sequential=False)
    assert hot[0] < hot[1] == pytest.approx(hot[2])
    slow = plan_homes(measured([1, 1.5, 1], [1.0, 1.5, 1.0]), even, is_sequential=False)
    assert slow[1] < slow[0] == pytest.approx(slow[2])
    barrier = plan_homes(measured([1, 1, 1], [2.0, 1.0, 1.0]), even, is_sequential=True)
    assert (barrier == even).all(), "a barrier has every layer's attention wait for the slowest"


def test_little_changes_and_little_knowledge_change_nothing():
    even = np.full(3, 1 / 3)
    for known in (measured([1, 1.01, 1], [1.0, 1.0, 1.0]), measured([1, 9, 1], [1.0, 1.0, 1.0], (5.0, 1.0, 3.0))):
        assert plan_homes(known, even, is_sequential=False) is even
    assert measured([1, 1, 1], [1, 1, 1]).knows_experts
    assert not replace(measured([1, 1, 1], [1, 1, 1]), pairs=np.array([[3.0, 1.0], [0.0, 0.0]])).knows_experts
    assert measured([1, 1, 1], [1, 1, 1]).batch_load() == pytest.approx(np.full((2, 4), 1.0))


def test_speeds_that_differ_little_move_no_experts():
    speeds = np.array([0.25, 0.7, 1.0, 1.4, 1.6, 4.0])
    assert lasting_speeds(speeds).tolist() == [0.25, 1.0, 1.0, 1.0, 1.6, 4.0]

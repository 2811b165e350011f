"""The bound: no system beats it, and it is what its docstring says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amoe.policy.placement import place_experts
from amoe.sim.flow.bound import bound, expert_work
from amoe.sim.flow.systems import ABLATIONS, BASELINES, WAVES, Case, simulate
from tests.unit.sim.flow.cases import cases, make_deployment

COLOCATED = [system for system in (*BASELINES, WAVES, *ABLATIONS) if system.attention_devices == 0]


@settings(max_examples=80)
@given(cases(), st.sampled_from(COLOCATED), st.integers(0, 9))
def test_no_system_beats_it(case, system, seed):
    limit = bound(case.deployment, case.popularity, case.owners(system.replicas))
    found = simulate(system, case, seed=seed, num_iterations=9)
    luck = 0.01 + 0.15 / np.sqrt(case.deployment.num_sequences * case.deployment.sizes.top_k)  # of six draws
    assert found.throughput <= limit.placed_throughput(case.deployment) * (1 + luck)
    assert limit.placed_throughput(case.deployment) <= limit.throughput(case.deployment)


@pytest.mark.parametrize("system", COLOCATED, ids=lambda system: system.name)
def test_at_high_load_and_level_systems_come_near_it(system):
    deployment = make_deployment(num_sequences=16_000, num_experts=4)
    popularity = np.full((4, 4), 0.25)
    case = Case(deployment=deployment, popularity=popularity, believed=popularity, slots=1)
    limit = bound(deployment, popularity, case.owners(system.replicas))
    assert simulate(system, case).throughput > 0.75 * limit.placed_throughput(deployment)


@given(cases(), st.integers(0, 99))
def test_no_division_of_the_sequences_is_cheaper(case, seed):
    """Whoever has how many of them, and at least one: attention and head take at least the work that is counted."""
    deployment = case.deployment
    sizes, costs = deployment.sizes, deployment.costs()
    rng = np.random.default_rng(seed)
    spare = deployment.num_sequences - deployment.num_devices
    division = 1 + rng.multinomial(spare, rng.dirichlet(np.ones(deployment.num_devices)))
    work = sum(
        costs.head(count) + sum(costs.attention(i, count, count * deployment.context) for i in range(sizes.num_layers))
        for count in division.tolist()
    )
    work += expert_work(deployment, case.popularity).sum() + sizes.num_sparse_layers * deployment.device.launch_s
    speed = (1 / deployment.slowdown).sum()
    assert bound(deployment, case.popularity).work_s <= work / speed * (1 + 1e-9)


@settings(max_examples=30)
@given(cases(), st.integers(0, 99))
def test_expert_work_is_less_than_what_drawn_tokens_need(case, seed):
    deployment = case.deployment
    sizes, costs = deployment.sizes, deployment.costs()
    pairs = deployment.num_sequences * sizes.top_k
    rng = np.random.default_rng(seed)
    for layer in range(sizes.num_layers):
        counts = rng.multinomial(pairs, case.popularity[layer], size=400)
        seconds = costs.experts(layer, counts) - deployment.device.launch_s
        least = expert_work(deployment, case.popularity)[layer].sum()
        if layer < sizes.num_dense_layers:
            assert least == 0.0
        else:
            assert least <= seconds.mean() + 4 * seconds.std() / 20


def confined_slowly(case, owners) -> float:
    """For every set of devices: the work of experts that nobody else has, over the set's speed."""
    work = expert_work(case.deployment, case.popularity)
    speed = case.deployment.owner_speed
    longest = 0.0
    for size in range(1, len(speed) + 1):
        for chosen in itertools.combinations(range(len(speed)), size):
            inside = 0.0
            for layer, expert in np.ndindex(*work.shape):
                if {int(owner) for owner in owners[layer, expert] if owner >= 0} <= set(chosen):
                    inside += work[layer, expert]
            longest = max(longest, inside / sum(speed[owner] for owner in chosen))
    return longest


@settings(max_examples=40)
@given(cases(), st.sampled_from(["none", "packed", "anchored"]))
def test_the_placement_bound_is_the_worst_set_of_devices_or_travelling(case, replicas):
    owners = case.owners(replicas)
    found = bound(case.deployment, case.popularity, owners)
    confined = confined_slowly(case, owners)
    assert found.placement_s >= confined * (1 - 1e-9)
    if case.deployment.fabric.intra.latency_s == 0.0:
        assert found.placement_s == pytest.approx(max(confined, found.latency_s))


def test_by_hand():
    """Two devices, one of them at half speed, two experts, two sequences."""
    deployment = make_deployment(
        num_layers=1, num_experts=2, num_devices=2, num_sequences=2, context=100, slow={1: 2.0}
    )
    sizes, device, costs = deployment.sizes, deployment.device, deployment.costs()
    popularity = np.array([[0.75, 0.25]])
    reading = sizes.expert_bytes / device.bandwidth
    home = costs.attention(0, 1, 100) + costs.head(1)
    work = 2 * home + (2 - np.exp(-1.5) - np.exp(-0.5)) * reading + device.launch_s
    latency = home + reading + device.launch_s
    found = bound(deployment, popularity, place_experts(1, 2, 2))
    assert found.work_s == pytest.approx(work / 1.5)
    assert found.latency_s == pytest.approx(latency)
    hop = 2 * deployment.fabric.intra.latency_s
    travelling = 2 / (1 / (latency + hop * 0.25) + 1 / (latency + hop * 0.75))
    assert found.placement_s == pytest.approx(travelling)
    assert found.throughput(deployment) == pytest.approx(2 / max(work / 1.5, latency) / 2)

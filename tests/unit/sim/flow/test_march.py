"""Lockstep by counts: against sums done by hand and against a slow one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amoe.policy.placement import place_experts
from amoe.profiles.links import Fabric, LinkProfile
from amoe.sim.flow.loads import Loads
from amoe.sim.flow.march import march
from amoe.sim.flow.result import summarise
from tests.unit.sim.flow.cases import make_deployment, plain_loads

LATENCY, BANDWIDTH = 2e-5, 1e10
FABRIC = Fabric(intra=LinkProfile(LATENCY, BANDWIDTH))


def one_hot_loads(num_waves: int = 1, **changes) -> Loads:
    """Every token goes to expert 0, at device 0."""
    deployment = make_deployment(fabric=FABRIC, **changes)
    sizes = deployment.sizes
    popularity = np.zeros((sizes.num_layers, sizes.num_experts))
    popularity[:, 0] = 1.0
    owners = place_experts(sizes.num_layers, sizes.num_experts, len(deployment.owners))
    return Loads(deployment, popularity, owners, "primary", deployment.tokens(num_waves))


def test_one_wave_is_a_sum():
    """Attention; three homes send 100 rows to device 0, which takes in 300; experts; 300 rows back; head."""
    loads = one_hot_loads(num_layers=3, num_dense_layers=1, dense_intermediate_size=512)
    deployment, costs = loads.deployment, loads.deployment.costs()
    rows = 300 * deployment.row_bytes / BANDWIDTH
    experts = float(costs.experts(1, np.array([400, 0])))
    attention = sum(costs.attention(layer, 100, 100 * 512) for layer in range(3))
    iteration = attention + 2 * (2 * (LATENCY + rows) + experts) + costs.head(100)
    result = march(loads)
    assert result.mean_itl == pytest.approx(iteration)
    assert result.p99_itl == pytest.approx(iteration)
    assert result.throughput == pytest.approx(100 / iteration)
    working = attention + costs.head(100) + 2 * experts / 4
    assert result.busy == pytest.approx(working / iteration, rel=1e-6)


@pytest.mark.parametrize("slow", [1.0, 2.0])
def test_a_device_alone_needs_no_network(slow):
    loads = plain_loads(make_deployment(num_devices=1, num_experts=1, slow={0: slow}))
    costs = loads.deployment.costs()
    layer = costs.attention(0, 400, 400 * 512) + float(costs.experts(0, np.array([400])))
    assert march(loads).mean_itl == pytest.approx(slow * (4 * layer + costs.head(400)))


def march_slowly(loads: Loads, num_iterations: int) -> list[float]:
    """When each iteration of a single wave in one node has ended at the last home; device by device."""
    deployment = loads.deployment
    sizes, link = deployment.sizes, deployment.fabric.intra
    per_row = deployment.row_bytes / link.bandwidth
    devices = range(deployment.num_devices)
    clock = [0.0] * deployment.num_devices

    def exchange(rows) -> None:
        """rows[source][target]; everybody waits for the slowest sender, and for what comes in at its own port."""
        sent = list(clock)
        begun, ended = (
            min(sent),
            max(
                sent[source] + sum(rows[source][target] for target in devices if target != source) * per_row
                for source in devices
            ),
        )
        for target in devices:
            incoming = sum(rows[source][target] for source in devices if source != target) * per_row
            clock[target] = max(ended + link.latency_s, begun + link.latency_s + incoming)

    ends = []
    for iteration in range(num_iterations):
        for layer in range(sizes.num_layers):
            for home in devices:
                clock[home] += loads.attention()[layer, home, 0]
            load = loads.layer(iteration, layer)
            exchange(load.rows[:, 0].tolist())
            for owner in devices:
                clock[owner] += load.seconds[0, owner]
            exchange(load.rows[:, 0].T.tolist())
        for home in devices:
            clock[home] += loads.head()[home, 0]
        ends.append(max(clock))
    return ends


@settings(max_examples=20)
@given(st.integers(2, 4), st.integers(1, 2), st.sampled_from([5, 400]), st.sampled_from([1e9, 1e11]), st.integers(0, 9))
def test_equals_the_slow_one(num_devices, top_k, num_sequences, bandwidth, seed):
    deployment = make_deployment(
        num_devices=num_devices,
        num_layers=2,
        top_k=top_k,
        num_sequences=num_sequences,
        fabric=Fabric(intra=LinkProfile(1e-5, bandwidth)),
    )
    loads = plain_loads(deployment, seed=seed)
    ends = march_slowly(loads, 6)
    result = march(loads, num_iterations=6, num_warmup=1)
    assert result.mean_itl == pytest.approx((ends[5] - ends[1]) / 4, rel=0.02)  # heads end apart, if loads differ


def test_two_waves_hide_communication():
    """Where links take as long as blocks two waves are faster, and never by more than what was hidden."""
    slow = Fabric(intra=LinkProfile(1e-3, 1e11))
    one, two = (
        march(plain_loads(make_deployment(num_sequences=8000, fabric=slow), waves, sigma=0.0)) for waves in (1, 2)
    )
    assert one.mean_itl - 4 * 2 * 1e-3 < two.mean_itl < 0.95 * one.mean_itl
    assert (one.num_waves, two.num_waves) == (1, 2)


def test_two_nodes_use_the_network():
    near, far = (
        march(plain_loads(make_deployment(fabric=Fabric(devices_per_node=count, inter=LinkProfile(1e-3, 1e9)))))
        for count in (4, 2)
    )
    assert far.mean_itl > near.mean_itl + 4 * 2 * 1e-3


def test_disaggregated_devices_take_turns():
    loads = plain_loads(make_deployment(attention_devices=2))
    result = march(loads)
    attention, head = loads.attention()[:, 0, 0].sum(), loads.head()[0, 0]
    experts = np.mean([[loads.layer(i, layer).seconds.max() for layer in range(4)] for i in range(6)]) * 4
    assert result.mean_itl == pytest.approx(attention + head + experts + 8 * 1e-5, rel=0.04)  # and rows


def test_figures_of_a_result():
    """Home 1 has no wave 1; of home 0, wave 1 stumbles once."""
    finished = np.array(
        [[[1.0, 1.5], [1.0, 0.0]], [[2.0, 2.5], [2.0, 0.0]], [[3.0, 4.5], [3.0, 0.0]], [[4.0, 5.5], [4.0, 0.0]]]
    )
    result = summarise(np.array([[3, 1], [96, 0]]), finished, np.array([1.1, 2.2]), 2, num_warmup=0)
    assert result.throughput == pytest.approx((3 + 96 + 3 / 4) / 2)
    assert result.mean_itl == pytest.approx((99 * 3 + 1 + 2 + 1) / 300)
    assert result.p99_itl == 1.0
    assert result.tail == pytest.approx(1.0 / result.mean_itl)
    assert result.busy == pytest.approx(1.65 / 5.5)

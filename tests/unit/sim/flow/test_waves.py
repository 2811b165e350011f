"""Waves by counts: every step once, no wave stuck, and sums done by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amoe.policy.placement import replicate_experts
from amoe.profiles.links import Fabric, LinkProfile
from amoe.profiles.routing import log_normal_routing
from amoe.sim.flow.loads import Loads
from amoe.sim.flow.march import march
from amoe.sim.flow.waves import HostModel, WaveSimulator
from tests.unit.sim.flow.cases import make_deployment, plain_loads
from tests.unit.sim.flow.test_march import BANDWIDTH, LATENCY, one_hot_loads

ATTENTION, EXPERTS, HEAD = 0, 1, 2


class Recorder(WaveSimulator):
    """Remembers every step that starts."""

    def run(self, **options):
        self.steps: list[tuple[float, int, int, int, int, int]] = []
        return super().run(**options)

    def _start(self, device, now):
        kind, wave, iteration, layer = self._waiting[device][0][2][1:]
        self.steps.append((now, device, kind, wave, iteration, layer))
        super()._start(device, now)


@st.composite
def loads(draw):
    """Anything from one sequence per wave to thousands, with slow devices and hot experts, and replicas or not."""
    num_devices, num_waves = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    dense = draw(st.integers(0, 1))
    deployment = make_deployment(
        num_layers=draw(st.integers(1, 7)) + dense,
        num_dense_layers=dense,
        dense_intermediate_size=1024,
        top_k=draw(st.integers(1, 2)),
        num_experts=draw(st.sampled_from([4, 8, 16])),
        num_devices=num_devices,
        attention_devices=draw(st.integers(0, num_devices - 1)),
        num_sequences=num_devices * num_waves * draw(st.sampled_from([1, 2, 8, 100])),
        fabric=Fabric(intra=LinkProfile(draw(st.sampled_from([1e-5, 1e-3])), 360e9)),
        slow={device: draw(st.sampled_from([1.0, 1.5, 5.0])) for device in range(num_devices)},
    )
    seed = draw(st.integers(0, 999))
    popularity = log_normal_routing(deployment.sizes, draw(st.sampled_from([0.0, 1.25, 2.5])), seed).popularity()
    num_owners = len(deployment.owners)
    slots = -(-deployment.sizes.num_experts // num_owners) + draw(st.integers(0, 1))
    owners = replicate_experts(popularity, num_owners, slots)
    mode = draw(st.sampled_from(["plan", "even", "level-home"]))
    shares = np.random.default_rng(seed).uniform(0.2, 1.0, len(deployment.homes)) if draw(st.booleans()) else None
    return Loads(deployment, popularity, owners, mode, deployment.tokens(num_waves, shares), seed=seed)


@settings(max_examples=120)
@given(loads())
def test_every_step_runs_once_and_nobody_waits_for_ever(loads):
    num_iterations = 6
    simulator = Recorder(loads)
    simulator.run(num_iterations=num_iterations, num_warmup=1)
    done = Counter(step[1:] for step in simulator.steps if step[4] < num_iterations)
    deployment = loads.deployment
    expected: Counter = Counter()
    for iteration in range(num_iterations):
        for home, wave in np.argwhere(loads.tokens > 0).tolist():
            expected[home, HEAD, wave, iteration, deployment.sizes.num_layers] = 1
            for layer in range(deployment.sizes.num_layers):
                expected[home, ATTENTION, wave, iteration, layer] = 1
        for layer in range(deployment.sizes.num_dense_layers, deployment.sizes.num_layers):
            for wave, owner in np.argwhere(loads.layer(iteration, layer).active).tolist():
                expected[deployment.owners.start + owner, EXPERTS, wave, iteration, layer] = 1
    assert done == expected


@settings(max_examples=40)
@given(loads())
def test_the_same_loads_give_the_same_run_whoever_has_asked_before(loads):
    first = WaveSimulator(loads).run(num_iterations=5, num_warmup=1)
    assert WaveSimulator(loads).run(num_iterations=5, num_warmup=1) == first
    assert 0 < first.throughput < np.inf
    assert 0 < first.busy <= 1 + 1e-9
    assert first.p99_itl >= 0.99 * first.mean_itl


@settings(max_examples=40)
@given(loads())
def test_a_wave_is_held_only_behind_another(loads):
    """Whenever a home starts a pass that nobody has started, its other waves are far enough ahead."""
    simulator = Recorder(loads)
    simulator.run(num_iterations=5, num_warmup=1)
    gap = simulator._order.gap * simulator._order.num_stages / loads.tokens.shape[1]
    begun: set[tuple[int, int]] = set()
    stage: dict[tuple[int, int], int] = {}
    for _, device, kind, wave, iteration, layer in simulator.steps:
        if kind == ATTENTION:
            if layer == 0 and (wave, iteration) not in begun and iteration == 0 and loads.deployment.colocated:
                others = [at for (home, other), at in stage.items() if home == device and other != wave]
                assert all(at >= gap for at in others)
            begun |= {(wave, iteration)} if layer == 0 else set()
            stage[device, wave] = 2 * layer + 1
        elif kind == HEAD:
            stage.pop((device, wave))


@settings(max_examples=40)
@given(loads())
def test_no_wave_is_left_behind(loads):
    """Waves of different size and luck make nearly as many passes."""
    simulator = Recorder(loads)
    simulator.run(num_iterations=8, num_warmup=1)
    latest = dict.fromkeys(map(tuple, np.argwhere(loads.tokens > 0).tolist()), 0)
    for _, device, kind, wave, iteration, _ in simulator.steps:
        if kind == ATTENTION:
            latest[device, wave] = iteration
            assert iteration - min(at for (home, _), at in latest.items() if home == device) <= 3


# ---- by hand


@pytest.mark.parametrize("num_waves", [1, 2, 3])
def test_one_sequence_alone_takes_the_sum_of_its_stages(num_waves):
    deployment = make_deployment(num_devices=1, num_sequences=1, num_dense_layers=1, dense_intermediate_size=1024)
    costs = deployment.costs()
    total = sum(costs.attention(layer, 1, 512) for layer in range(4)) + costs.head(1)
    total += 3 * float(costs.experts(1, np.array([1])))
    result = WaveSimulator(plain_loads(deployment, num_waves)).run()
    assert result.mean_itl == pytest.approx(total, rel=1e-9)
    assert result.p99_itl == pytest.approx(total, rel=1e-9)
    assert result.throughput == pytest.approx(1 / total, rel=1e-9)


def test_one_wave_is_a_sum():
    """Device 0 answers the homes in turn, so they begin apart, and what they send next finds its port free."""
    loads = one_hot_loads(num_layers=3, num_dense_layers=1, dense_intermediate_size=512)
    deployment, costs = loads.deployment, loads.deployment.costs()
    rows = 100 * deployment.row_bytes / BANDWIDTH
    experts = float(costs.experts(1, np.array([400, 0])))
    attention = sum(costs.attention(layer, 100, 100 * 512) for layer in range(3))
    iteration = attention + 2 * (2 * LATENCY + 4 * rows + experts) + costs.head(100)
    assert WaveSimulator(loads).run().mean_itl == pytest.approx(iteration)


@pytest.mark.parametrize("num_sequences", [4, 40, 400, 4000])
@pytest.mark.parametrize("sigma", [0.0, 1.25])
def test_one_wave_is_lockstep(num_sequences, sigma):
    """It is a little faster, since nobody waits for answers to others."""
    loads = plain_loads(make_deployment(num_sequences=num_sequences), sigma=sigma)
    barrier, wave = march(loads, num_iterations=12), WaveSimulator(loads).run(num_iterations=12, num_warmup=2)
    assert barrier.throughput * (1 - 1e-9) <= wave.throughput <= barrier.throughput * 1.02


@pytest.mark.parametrize("num_waves", [1, 2])
def test_a_slow_device_alone_is_that_much_slower(num_waves):
    normal, slow = (
        WaveSimulator(plain_loads(make_deployment(num_devices=1, slow={0: factor}), num_waves)).run()
        for factor in (1.0, 2.0)
    )
    assert slow.mean_itl == pytest.approx(2 * normal.mean_itl)


def test_a_slow_device_among_others_slows_everybody_but_not_by_more():
    normal, slow = (
        WaveSimulator(plain_loads(make_deployment(num_sequences=8000, slow={0: factor}), 2, sigma=0.0)).run()
        for factor in (1.0, 2.0)
    )
    assert 0.49 * normal.throughput < slow.throughput < 0.8 * normal.throughput


def test_more_waves_overlap_hot_experts_of_different_layers():
    popularity = np.full((4, 8), 0.02)
    popularity[np.arange(4), [0, 2, 4, 6]] = 1.0  # another device is hot in every layer
    deployment = make_deployment(num_sequences=16_000)
    owners = np.tile((np.arange(8) // 2).astype(np.int16)[:, None], (4, 1, 1))
    one, three = (
        WaveSimulator(
            Loads(deployment, popularity / popularity.sum(axis=1, keepdims=True), owners, "primary", tokens)
        ).run()
        for tokens in (deployment.tokens(1), deployment.tokens(3))
    )
    assert three.throughput > 1.2 * one.throughput
    assert three.num_waves == 3


def test_waves_share_the_ports():
    """All rows go to one device, over a link so slow that nothing else counts."""
    slow = Fabric(intra=LinkProfile(0.0, 1e6))
    deployment = make_deployment(num_layers=1, fabric=slow)
    popularity = np.eye(8)[:1]
    owners = np.zeros((1, 8, 1), np.int16)
    loads = Loads(deployment, popularity, owners, "primary", deployment.tokens(3))
    rows = 300 * deployment.row_bytes / 1e6
    assert WaveSimulator(loads).run().mean_itl == pytest.approx(rows, rel=0.1)


# ---- host time


def host_times(kind: str, num_waves: int, seconds: float) -> tuple[float, float, float]:
    """Mean ITL with and without host time, and the host time of an iteration: one device, 2L + 1 steps per wave."""
    loads = plain_loads(make_deployment(num_devices=1, num_experts=1), num_waves)
    without = WaveSimulator(loads).run().mean_itl
    return WaveSimulator(loads, HostModel(seconds, kind)).run().mean_itl, without, 9 * num_waves * seconds


@pytest.mark.parametrize("num_waves", [1, 2])
def test_a_serial_host_is_seen_at_every_step(num_waves):
    found, without, host = host_times("serial", num_waves, 3e-5)
    assert found == pytest.approx(without + host)


@pytest.mark.parametrize("num_waves", [1, 2])
def test_a_hidden_host_is_never_seen(num_waves):
    found, without, _ = host_times("hidden", num_waves, 3e-5)
    assert found == without


def test_a_host_that_prepares_ahead_is_seen_where_there_is_nothing_to_prepare():
    """A wave that is alone has no next step before this one has ended; of two waves the other's is known."""
    found, without, host = host_times("ahead", 1, 3e-5)
    assert found == pytest.approx(without + host)
    found, without, host = host_times("ahead", 2, 3e-5)
    assert without <= found < without + 0.3 * host


def test_a_host_prepares_one_step_at_a_time():
    """A step may be ready for long, but its preparation begins with the step before it."""
    found, _, host = host_times("ahead", 4, 1.0)
    assert found >= host * (1 - 1e-3)

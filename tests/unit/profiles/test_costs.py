"""Rooflines, devices and links, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoe.errors import ConfigError
from amoe.profiles.costs import RooflineCosts
from amoe.profiles.devices import DEVICES, DeviceProfile, device_profile
from amoe.profiles.links import FABRICS, Fabric, LinkProfile
from amoe.profiles.models import MODELS, ModelSizes

# 1000 FLOP/s and 100 byte/s are reached.
DEVICE = DeviceProfile(
    name="toy",
    peak_flops=2000,
    memory_bandwidth=125,
    memory_bytes=1e6,
    compute_efficiency=0.5,
    launch_s=7.0,
    sampling_s=11.0,
)
SIZES = ModelSizes(
    name="toy",
    num_layers=2,
    num_dense_layers=1,
    dense_intermediate_size=5,
    hidden_size=10,
    num_experts=4,
    top_k=2,
    moe_intermediate_size=2,
    shared_intermediate_size=3,
    vocab_size=100,
    attention_params=200,
    attention_flops=50,
    kv_bytes=3,
)
COSTS = RooflineCosts(SIZES, DEVICE)


def test_attention_reads_or_computes_its_weights_and_then_mixes():
    # 200 + 10·4 + 3·10·3 = 330 parameters: 660 bytes are 6.6 s, 0.66 s per token. KV: 0.03 s or 0.05 s each.
    assert COSTS.attention(1, 1, 20) == pytest.approx(7 + 6.6 + 1.0)
    assert COSTS.attention(1, 10, 0) == pytest.approx(7 + 6.6)
    assert COSTS.attention(1, 20, 100) == pytest.approx(7 + 13.2 + 5.0)
    assert COSTS.attention(0, 1, 0) == pytest.approx(7 + (200 + 3 * 10 * 5) * 2 / 100)
    assert COSTS.attention(1, 0, 0) == 0.0


def test_every_expert_has_a_roofline_of_its_own():
    # 60 parameters: 1.2 s to read, 0.12 s per pair, so the ridge is at 10 pairs.
    assert float(COSTS.experts(1, np.array([1, 0, 10, 20]))) == pytest.approx(7 + 1.2 + 1.2 + 2.4)
    assert float(COSTS.experts(1, np.zeros(4, np.int64))) == 0.0
    batches = np.array([[[1, 0, 0, 0]], [[0, 0, 0, 0]], [[3, 3, 3, 30]]])
    assert COSTS.experts(1, batches).tolist() == [[pytest.approx(8.2)], [0.0], [pytest.approx(7 + 3.6 + 3.6)]]


def test_the_head_samples():
    assert COSTS.head(1) == pytest.approx(7 + 11 + 20)
    assert COSTS.head(20) == pytest.approx(7 + 11 + 40)
    assert COSTS.head(0) == 0.0


@given(st.floats(0.2, 5.0), st.integers(1, 3000), st.integers(0, 100_000))
def test_a_slowed_device_takes_that_much_longer_for_everything(factor, count, context):
    sizes, device = MODELS["deepseek-v3"], DEVICES["h200"]
    normal, slow = RooflineCosts(sizes, device), RooflineCosts(sizes, device.slowed(factor))
    counts = np.arange(sizes.num_experts) * count // 100
    assert slow.attention(5, count, context) == pytest.approx(factor * normal.attention(5, count, context))
    assert float(slow.experts(5, counts)) == pytest.approx(factor * float(normal.experts(5, counts)))
    assert slow.head(count) == pytest.approx(factor * normal.head(count))


@pytest.mark.parametrize("name", ["h100", "a100-80g"])
def test_ridge(name):
    """Tokens from which on an expert in 16 bits computes for longer than it reads: 221 on an H100, as in the study."""
    device = DEVICES[name]
    ridge = device.flops / device.bandwidth
    assert ridge == pytest.approx({"h100": 221, "a100-80g": 115}[name], abs=1)
    sizes = MODELS["mixtral-8x7b"]
    costs = RooflineCosts(sizes, device)
    reading = sizes.expert_bytes / device.bandwidth + device.launch_s
    assert float(costs.experts(0, np.array([1]))) == pytest.approx(reading)
    assert float(costs.experts(0, np.array([int(ridge)]))) == pytest.approx(reading)
    assert float(costs.experts(0, np.array([2 * ridge]))) == pytest.approx(2 * reading - device.launch_s)


@pytest.mark.parametrize(
    "wrong",
    [
        {"peak_flops": 0},
        {"memory_bandwidth": -1},
        {"memory_bytes": 0},
        {"slowdown": 0},
        {"compute_efficiency": 0},
        {"bandwidth_efficiency": 1.1},
        {"launch_s": -1e-9},
        {"sampling_s": -1},
    ],
    ids=str,
)
def test_devices_that_cannot_be_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        replace(DEVICE, **wrong)


def test_an_unknown_device_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="'tpu'; known: a100-80g"):
        device_profile("tpu")
    assert device_profile("b200").name == "b200"


def test_every_device_has_a_fabric():
    assert set(FABRICS) == set(DEVICES)
    for fabric in FABRICS.values():
        assert fabric.inter.bandwidth < fabric.intra.bandwidth


def test_nodes():
    fabric = Fabric(devices_per_node=2)
    assert fabric.same_node(5).astype(int).tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    for wrong in (lambda: LinkProfile(-1.0, 1.0), lambda: LinkProfile(0.0, 0.0), lambda: Fabric(devices_per_node=0)):
        with pytest.raises(ConfigError):
            wrong()

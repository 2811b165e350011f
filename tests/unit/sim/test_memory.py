"""KV blocks from what weights leave of a device's memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from amoe.config import CacheConfig, PlacementConfig, SchedulerConfig
from amoe.errors import ConfigError
from amoe.profiles.devices import device_profile
from amoe.profiles.models import model_sizes
from amoe.profiles.routing import log_normal_routing
from amoe.sim.config import SimConfig, Window
from amoe.sim.memory import DEVICE_SHARE, check_weights_fit, num_kv_blocks, weight_bytes
from amoe.sim.workload import Lengths, Workload

MIXTRAL = model_sizes("mixtral-8x7b")


def make_config(**changes) -> SimConfig:
    values = {
        "sizes": MIXTRAL,
        "device": device_profile("h100"),
        "routing": log_normal_routing(MIXTRAL, 0.0, seed=0),
        "workload": Workload(concurrency=1, input=Lengths(mean=1000), output=Lengths(mean=1000)),
        "window": Window(length=1.0),
        "placement": PlacementConfig(colocated=4),
        "scheduler": SchedulerConfig(max_num_seqs=1024),
    }
    return SimConfig(**(values | changes))


def test_weights_of_attention_and_expert_workers_make_those_of_a_colocated_one():
    placement = PlacementConfig(attention_workers=4, expert_workers=4)
    config = make_config(placement=placement)
    assert weight_bytes(config, 0) == MIXTRAL.attention_bytes
    assert weight_bytes(config, 4) == 2 * 32 * MIXTRAL.expert_bytes
    assert weight_bytes(make_config(), 0) == weight_bytes(config, 0) + weight_bytes(config, 4)
    assert 93e9 < MIXTRAL.attention_bytes + 8 * 32 * MIXTRAL.expert_bytes < 94e9  # the real one has 93.4 GB


def test_an_odd_number_of_experts_is_rounded_up():
    config = make_config(placement=PlacementConfig(colocated=3))
    assert weight_bytes(config, 0) == MIXTRAL.attention_bytes + 3 * 32 * MIXTRAL.expert_bytes


def test_blocks_fill_a_share_of_the_rest():
    config = make_config()
    block_bytes = 16 * 32 * 4096
    assert num_kv_blocks(config) == int((80e9 - weight_bytes(config, 0)) * DEVICE_SHARE / block_bytes)


def test_there_are_never_more_than_can_be_used():
    assert num_kv_blocks(make_config(scheduler=SchedulerConfig(max_num_seqs=3))) == 3 * 125


def test_given_sizes_hold():
    assert num_kv_blocks(make_config(cache=CacheConfig(num_blocks=200))) == 200
    assert num_kv_blocks(make_config(cache=CacheConfig(kv_cache_bytes=300 * 16 * 32 * 4096))) == 300


@pytest.mark.parametrize("cache", [CacheConfig(num_blocks=124), CacheConfig(kv_cache_bytes=1000)])
def test_a_sequence_that_does_not_fit_is_refused(cache):
    with pytest.raises(ConfigError, match="2000 tokens needs 125 KV blocks"):
        num_kv_blocks(make_config(cache=cache))


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"worker 0 take 93\.\d GB, and a h100 has 80\.0 GB"):
        check_weights_fit(make_config(placement=PlacementConfig()))
    check_weights_fit(make_config(placement=PlacementConfig(), device=device_profile("h200")))
    with pytest.raises(ConfigError, match="has room for 0"):
        num_kv_blocks(make_config(device=replace(device_profile("h100"), memory_bytes=20e9)))

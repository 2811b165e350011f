"""The device string of emulation, and the sizes, costs and memory that it stands for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from amoe.cluster.local import ring_bytes_for
from amoe.config import CacheConfig, EngineConfig, PlacementConfig, SchedulerConfig
from amoe.engine.emulated_device import (
    EmulatedDevice,
    emulated_device,
    emulated_length,
    plan_emulated_kv,
    served_shape,
)
from amoe.errors import ConfigError
from amoe.models.config import load_model_config
from amoe.profiles.checkpoints import checkpoint_sizes
from amoe.profiles.costs import RooflineCosts
from amoe.profiles.devices import DEVICES
from amoe.profiles.models import MODELS

MIXTRAL = MODELS["mixtral-8x7b"]


def test_parse() -> None:
    assert EmulatedDevice.parse("emulated:h100") == EmulatedDevice(profile="h100")
    text = "emulated:b200,slow=20,sigma=1.25,seed=3,model=deepseek-v3,straggler=0:1.5,straggler=2:3"
    assert EmulatedDevice.parse(text) == EmulatedDevice(
        profile="b200", slow=20.0, sigma=1.25, seed=3, model="deepseek-v3", stragglers=((0, 1.5), (2, 3.0))
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("emulated:z9", "no device profile 'z9'; known: a100-80g, h100"),
        ("emulated:", "no device profile ''"),
        ("emulated", "no device profile"),
        ("emulated:none.json", "no measured profile 'none.json'"),
        ("emulated:h100,slow=0", "slow: the factor must be greater than 0"),
        ("emulated:h100,slow=inf", "finite"),
        ("emulated:h100,slow=nan", "finite"),
        ("emulated:h100,slow=fast", "'slow=fast' needs a number"),
        ("emulated:h100,slow", "'slow' needs a number"),
        ("emulated:h100,sigma=-1", "sigma must be at least 0"),
        ("emulated:h100,seed=1.5", "'seed=1.5' needs a whole number"),
        ("emulated:h100,seed=-1", "seed must be at least 0"),
        ("emulated:h100,model=gpt-9", "no sizes of a model 'gpt-9'; known: mixtral-8x7b"),
        ("emulated:h100,speed=2", "'speed=2' is unknown or there twice; write emulated:PROFILE"),
        ("emulated:h100,slow=2,slow=3", "there twice"),
        ("emulated:h100,straggler=1", "'straggler=1' needs RANK:FACTOR"),
        ("emulated:h100,straggler=1:0", "straggler=1: the factor"),
        ("emulated:h100,straggler=0:2,straggler=0:3", "a rank twice"),
        ("emulated:h100,straggler=1:2", "there is no worker 1"),
    ],
)
def test_what_cannot_be_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        emulated_device(EngineConfig(model="m", device=text))


def test_other_devices_are_not_emulated() -> None:
    assert emulated_device(EngineConfig(model="m", device="cpu")) is None
    assert emulated_device(EngineConfig(model="m", device="cuda:1")) is None


def test_costs_are_slowed_by_worker() -> None:
    device = EmulatedDevice.parse("emulated:h100,slow=10,straggler=1:2")
    modelled = RooflineCosts(MIXTRAL, DEVICES["h100"])
    counts = np.array([3, 0, 9])
    for rank, factor in ((0, 10), (1, 20)):
        costs = device.costs(MIXTRAL, rank)
        assert costs.head(4) == pytest.approx(factor * modelled.head(4))
        assert costs.attention(0, 4, 99) == pytest.approx(factor * modelled.attention(0, 4, 99))
        assert costs.experts(0, counts) == pytest.approx(factor * modelled.experts(0, counts))


def test_routing_is_the_same_at_all_workers_and_skewed_by_sigma() -> None:
    skewed = EmulatedDevice.parse("emulated:h100,sigma=1.25").routing(MIXTRAL).popularity()
    again = EmulatedDevice.parse("emulated:h100,sigma=1.25").routing(MIXTRAL).popularity()
    uniform = EmulatedDevice.parse("emulated:h100").routing(MIXTRAL).popularity()
    assert (skewed == again).all()
    assert skewed.max() > 1.5 * uniform.max()


def test_sizes_come_from_the_checkpoint_or_by_name(checkpoint_factory: Callable[..., Path]) -> None:
    path = checkpoint_factory("qwen2_moe")
    checkpoint = load_model_config(path)
    sizes = checkpoint_sizes(checkpoint)
    assert (sizes.num_layers, sizes.num_experts, sizes.top_k) == (
        checkpoint.num_layers,
        checkpoint.num_experts,
        checkpoint.top_k,
    )
    assert sizes.sparse_layers == checkpoint.sparse_layers
    assert sizes.shared_intermediate_size == checkpoint.shared_expert_intermediate_size
    config = EngineConfig(model=str(path), device="emulated:h100")
    assert served_shape(config) == sizes
    assert served_shape(replace(config, device="emulated:h100,model=mixtral-8x7b")) == MIXTRAL
    assert served_shape(replace(config, device="cpu")) == checkpoint
    with pytest.raises(ConfigError, match="dense layers come first"):
        checkpoint_sizes(replace(checkpoint, sparse_layers=(True, False)))


def test_measured_profile_brings_its_model(tmp_path: Path, checkpoint_factory: Callable[..., Path]) -> None:
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps({"format": "?"}))
    with pytest.raises(ConfigError, match="leave out model="):
        EmulatedDevice.parse(f"emulated:{path},model=mixtral-8x7b")
    with pytest.raises(ConfigError, match=r"cpu\.json: not a measured profile"):
        served_shape(EngineConfig(model=str(checkpoint_factory("olmoe")), device=f"emulated:{path}"))
    assert EmulatedDevice(profile=str(path)).memory_bytes() == math.inf


def test_rings_of_emulated_workers_are_half_as_large(checkpoint_factory: Callable[..., Path]) -> None:
    emulated = EngineConfig(model=str(checkpoint_factory("olmoe")), device="emulated:h100")
    config = replace(emulated, device="cpu")
    real = ring_bytes_for(config, served_shape(config))
    assert 0.4 < ring_bytes_for(emulated, served_shape(emulated)) / real < 0.7


class TestKVCache:
    config = EngineConfig(
        model="m", placement=PlacementConfig(colocated=4), scheduler=SchedulerConfig(max_num_seqs=1000)
    )
    device = EmulatedDevice(profile="h100")

    def test_fills_the_device(self) -> None:
        plan = plan_emulated_kv(self.config, self.device, MIXTRAL, 32768, 22e9)
        assert plan.num_blocks == int((72e9 - 22e9) // (MIXTRAL.kv_bytes * 32 * 16))
        assert plan.max_model_len == 32768

    def test_holds_no_more_than_sequences_can_fill(self) -> None:
        plan = plan_emulated_kv(self.config, self.device, MIXTRAL, 32, 22e9)
        assert plan.num_blocks == 2000

    def test_is_as_configured(self) -> None:
        config = replace(self.config, cache=CacheConfig(num_blocks=7))
        plan = plan_emulated_kv(config, self.device, MIXTRAL, 4096, 22e9)
        assert (plan.num_blocks, plan.max_model_len) == (7, 112)
        with pytest.raises(ConfigError, match="lower --max-model-len"):
            plan_emulated_kv(replace(config, max_model_len=4096), self.device, MIXTRAL, 4096, 22e9)

    def test_memory_of_a_measured_profile_is_not_known(self, tmp_path: Path) -> None:
        path = tmp_path / "cpu.json"
        path.touch()
        plan = plan_emulated_kv(self.config, EmulatedDevice(profile=str(path)), MIXTRAL, 32, 1e15)
        assert plan.num_blocks == 2000

    def test_weights_have_to_fit(self) -> None:
        with pytest.raises(ConfigError, match="use more workers"):
            plan_emulated_kv(self.config, self.device, MIXTRAL, 4096, 73e9)

    def test_length(self, checkpoint_factory: Callable[..., Path]) -> None:
        checkpoint = load_model_config(checkpoint_factory("olmoe"))
        assert emulated_length(self.config, checkpoint) == checkpoint.max_position_embeddings
        assert emulated_length(replace(self.config, max_model_len=100_000), checkpoint) == 100_000
        with pytest.raises(ConfigError, match="too much"):
            emulated_length(replace(self.config, max_model_len=1 << 21), checkpoint)

"""What a server tells of itself when it is ready."""

from __future__ import annotations

import pytest

from amoe.config import EngineConfig, PlacementConfig, SchedulerConfig
from amoe.engine.async_engine import ModelInfo
from amoe.engine.messages import Ready
from amoe.models.config import load_model_config
from amoe.server.announcement import placement_text, summary


def test_model_and_room(checkpoint_factory):
    directory = str(checkpoint_factory("mixtral"))
    config = EngineConfig(
        model=directory,
        max_waiting=7,
        placement=PlacementConfig(attention_workers=2, expert_workers=1),
        scheduler=SchedulerConfig(max_num_seqs=3),
    )
    info = ModelInfo(name="small", max_model_len=64, vocab_size=300)
    model, room = summary(config, info, [Ready(64, 100, 16, 0), Ready(64, 50, 16, 0), Ready(64, 0, 16, 0)])
    sizes = load_model_config(directory)
    assert model == (
        f"model: small (MixtralForCausalLM, {sizes.num_layers} layers, {sizes.num_experts} experts, "
        f"{sizes.top_k} per token), {sizes.torch_dtype} on cpu, 2 attention and 1 expert workers, schedule waves"
    )
    served = [
        Ready(64, 100, 16, 0, kernels=text) for text in ("torch kernels", "native kernels for x", "torch kernels")
    ]
    assert "on cpu, native kernels for x, torch kernels, 2 attention" in summary(config, info, served)[0]
    assert room == "room: max_model_len 64, 6 sequences run and 7 wait, KV cache of 2400 tokens"


@pytest.mark.parametrize(
    ("placement", "text"),
    [
        (PlacementConfig(), "1 worker"),
        (PlacementConfig(colocated=1), "1 colocated worker"),
        (PlacementConfig(colocated=2), "2 colocated workers"),
        (PlacementConfig(expert_workers=2, max_expert_workers=2), "1 attention and 2 expert workers"),
        (PlacementConfig(expert_workers=2, max_expert_workers=6), "1 attention and 2 expert workers (up to 6)"),
    ],
)
def test_workers(placement, text):
    assert placement_text(placement) == text

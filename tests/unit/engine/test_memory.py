"""How many KV blocks there are, and how long a sequence may be."""

from __future__ import annotations

import pytest
import torch

from amoe.config import CacheConfig, EngineConfig, SchedulerConfig
from amoe.engine.memory import DEVICE_SHARE, HOST_SHARE, plan_kv_cache
from amoe.errors import ConfigError
from amoe.models.config import ModelConfig, RopeConfig

MODEL = ModelConfig(
    architecture="MixtralForCausalLM",
    vocab_size=10,
    hidden_size=8,
    num_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    intermediate_size=0,
    moe_intermediate_size=8,
    num_experts=2,
    top_k=1,
    norm_topk_prob=True,
    sparse_layers=(True, True),
    rope=RopeConfig(theta=1e4),
    rms_norm_eps=1e-5,
    max_position_embeddings=100,
)
BLOCK_BYTES = 2 * 16 * 2 * 4 * 4  # layers, tokens, key and value, head size, float32


def plan(available_blocks=0, num_sharing=1, device="cpu", max_model_len=None, max_num_seqs=1000, **cache):
    config = EngineConfig(
        model="x",
        device=device,
        max_model_len=max_model_len,
        scheduler=SchedulerConfig(max_num_seqs=max_num_seqs),
        cache=CacheConfig(**cache),
    )
    return plan_kv_cache(config, MODEL, torch.float32, available_blocks * BLOCK_BYTES, num_sharing)


@pytest.mark.parametrize(
    ("device", "share"), [("cpu", HOST_SHARE), ("cpu:0", HOST_SHARE), ("cuda", DEVICE_SHARE), ("cuda:1", DEVICE_SHARE)]
)
def test_workers_of_one_memory_divide_a_share_of_it(device, share):
    assert plan(1000, num_sharing=2, device=device).num_blocks == int(1000 * share) // 2


def test_never_more_than_all_sequences_could_fill():
    assert plan(10_000, max_num_seqs=3).num_blocks == 3 * 7


def test_a_small_cache_shortens_sequences_unless_the_user_wants_a_length():
    assert plan(num_blocks=3).max_model_len == 48
    assert plan(num_blocks=3, max_model_len=48).max_model_len == 48
    with pytest.raises(ConfigError, match="--max-model-len 49 needs"):
        plan(num_blocks=3, max_model_len=49)
    with pytest.raises(ConfigError, match="more than the model was trained for"):
        plan(1000, max_model_len=101)
    with pytest.raises(ConfigError, match="no room for a KV cache"):
        plan(kv_cache_bytes=BLOCK_BYTES - 1)

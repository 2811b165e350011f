"""How many KV blocks an attention worker gets, and how long a sequence may be."""

from __future__ import annotations

import os

import torch

from amoe.config import EngineConfig
from amoe.engine.kv_plan import KVPlan
from amoe.errors import ConfigError
from amoe.kernels.attention import KVCache
from amoe.models.config import ModelConfig

# Of what is free once the weights are loaded. A device is there to be filled; a host has other tenants.
DEVICE_SHARE = 0.85
HOST_SHARE = 0.25


def free_bytes(device: torch.device) -> int:
    """Memory that nobody uses yet, in bytes."""
    if device.type == "cpu":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    module = torch.get_device_module(device)
    free, _ = module.mem_get_info(device)
    return int(free)


def longest_sequence(config: EngineConfig, model: ModelConfig) -> int:
    """Tokens of a sequence at most, memory not considered.

    Raises:
        ConfigError: more are asked for than the model can tell apart.
    """
    longest = config.max_model_len or model.max_position_embeddings
    if longest > model.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len {longest} is more than the model was trained for ({model.max_position_embeddings})"
        )
    return longest


def plan_kv_cache(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, available_bytes: int, num_sharing: int
) -> KVPlan:
    """Size the cache: as configured, else a share of `available_bytes`, which `num_sharing` workers divide among them,
    but never more than all running sequences at full length could fill.

    Raises:
        ConfigError: a sequence of the length asked for does not fit.
    """
    block_size = config.cache.block_size
    longest = longest_sequence(config, model)
    block_bytes = KVCache.bytes_per_block(
        model.num_layers, block_size, model.num_key_value_heads, model.head_dim, dtype
    )
    useful = config.scheduler.max_num_seqs * -(-longest // block_size)
    num_blocks = config.cache.num_blocks
    if num_blocks is None:
        share = HOST_SHARE if torch.device(config.device).type == "cpu" else DEVICE_SHARE
        budget = config.cache.kv_cache_bytes or int(available_bytes * share) // num_sharing
        num_blocks = min(budget // block_bytes, useful)
    capacity = num_blocks * block_size
    if capacity < longest and config.max_model_len is not None:
        raise ConfigError(
            f"a sequence of --max-model-len {longest} needs {-(-longest // block_size) * block_bytes:,} bytes of KV "
            f"cache, and there are {num_blocks * block_bytes:,}: raise --kv-cache-memory-bytes (or --num-kv-blocks), "
            "or lower --max-model-len"
        )
    if capacity < 2:
        raise ConfigError(f"no room for a KV cache: one block takes {block_bytes:,} bytes; set --kv-cache-memory-bytes")
    return KVPlan(num_blocks, min(longest, capacity))

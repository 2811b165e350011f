"""How many KV blocks a virtual attention worker gets: what weights leave of the device's memory."""

from __future__ import annotations

import numpy as np

from amoe.errors import ConfigError
from amoe.sim.config import SimConfig

# Of what is free once the weights are loaded, as `amoe.engine.memory` takes of a device.
DEVICE_SHARE = 0.85


def weight_bytes(config: SimConfig, rank: int) -> float:
    """Bytes of the weights of worker `rank`: attention blocks and head, its experts, or both. The largest share of the
    experts counts, so that all workers of a kind get caches of one size."""
    sizes, placement = config.sizes, config.placement
    total = sizes.attention_bytes if rank in placement.attention_ranks else 0.0
    if rank in placement.expert_ranks:
        total += _experts_per_owner(config) * sizes.num_sparse_layers * sizes.expert_bytes
    return total


def _experts_per_owner(config: SimConfig) -> int:
    """Experts of a layer that an expert worker holds at most, replicas included."""
    num_owners = len(config.placement.expert_ranks)
    if config.owners is None:
        return -(-config.sizes.num_experts // num_owners)
    return max(int(np.bincount(layer[layer >= 0], minlength=num_owners).max()) for layer in config.owners)


def check_weights_fit(config: SimConfig) -> None:
    """Refuse a placement whose weights no device holds.

    Raises:
        ConfigError: naming worker and sizes.
    """
    for rank in range(config.placement.num_workers):
        needed = weight_bytes(config, rank)
        if needed > config.device.memory_bytes:
            raise ConfigError(
                f"the weights of worker {rank} take {needed / 1e9:.1f} GB, and a {config.device.name} has "
                f"{config.device.memory_bytes / 1e9:.1f} GB: use more workers"
            )


def num_kv_blocks(config: SimConfig) -> int:
    """Blocks of each attention worker: as configured, else a share of what the weights leave, but no more than all
    running sequences at full length could fill.

    Raises:
        ConfigError: the longest sequence does not fit.
    """
    cache, sizes = config.cache, config.sizes
    blocks_per_sequence = -(-config.longest_sequence // cache.block_size)
    num_blocks = cache.num_blocks
    if num_blocks is None:
        free = config.device.memory_bytes - weight_bytes(config, config.placement.attention_ranks[0])
        budget = cache.kv_cache_bytes or free * DEVICE_SHARE
        block_bytes = cache.block_size * sizes.num_layers * sizes.kv_bytes
        num_blocks = int(min(budget / block_bytes, config.scheduler.max_num_seqs * blocks_per_sequence))
    if num_blocks < blocks_per_sequence:
        raise ConfigError(
            f"a sequence of {config.longest_sequence} tokens needs {blocks_per_sequence} KV blocks, "
            f"and an attention worker has room for {max(0, num_blocks)}: use shorter sequences or more workers"
        )
    return num_blocks

"""Which worker holds which expert. Pure functions of sizes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from amoe.errors import ConfigError
from amoe.types import Int16Array


def place_experts(num_layers: int, num_experts: int, num_owners: int) -> Int16Array:
    """Contiguous shares, the usual expert parallelism: owner o holds experts [o·E/D, (o+1)·E/D) of every layer.

    Returns:
        [num_layers, num_experts] index of the owner (not its rank) of each expert; shares differ by at most one.

    Raises:
        ConfigError: more owners than experts: some would hold nothing.
    """
    if num_owners > num_experts:
        raise ConfigError(
            f"{num_owners} workers cannot share {num_experts} experts: use at most {num_experts} expert workers"
        )
    owners = (np.arange(num_experts) * num_owners // num_experts).astype(np.int16)
    return np.tile(owners, (num_layers, 1))


def experts_of(owners: Int16Array, owner: int, sparse_layers: Sequence[bool]) -> dict[int, tuple[int, ...]]:
    """Experts per MoE layer that `owner` holds, ascending: `{layer: (expert, ...)}`."""
    return {
        layer: tuple(int(expert) for expert in np.flatnonzero(owners[layer] == owner))
        for layer, sparse in enumerate(sparse_layers)
        if sparse
    }

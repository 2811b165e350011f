"""What a worker is for."""

from __future__ import annotations

from amoe.config import EngineConfig


def role_of(config: EngineConfig, rank: int) -> str:
    """ "attention", "experts", or "colocated" for both."""
    is_home, is_owner = rank in config.placement.attention_ranks, rank in config.placement.owner_ranks
    return "colocated" if is_home and is_owner else "attention" if is_home else "experts"

"""What is decided about a KV cache: by `amoe.engine.memory`, or for an emulated device."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KVPlan:
    """Size of the KV cache of one attention worker, and the longest sequence that it can serve."""

    num_blocks: int
    max_model_len: int

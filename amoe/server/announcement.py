"""What a server tells of itself when it is ready: what it serves, on what, and how much at once."""

from __future__ import annotations

from collections.abc import Sequence

from amoe.config import EngineConfig, PlacementConfig
from amoe.engine.async_engine import ModelInfo
from amoe.engine.emulated_device import served_shape
from amoe.engine.messages import Ready
from amoe.models.config import load_model_config


def summary(config: EngineConfig, info: ModelInfo, ready: Sequence[Ready]) -> list[str]:
    """Two lines: the model and where it runs; and its room.

    Args:
        ready: what each worker has said, by rank.
    """
    model, shape = load_model_config(config.model), served_shape(config)
    size = f"{len(shape.sparse_layers)} layers, {shape.num_experts} experts, {shape.top_k} per token"
    dtype = model.torch_dtype if config.dtype == "auto" else config.dtype
    device = config.device.partition(",")[0]  # an emulated one has a list of parameters
    kernels = "".join(f", {text}" for text in sorted({one.kernels for one in ready} - {""}))
    placement, scheduler = config.placement, config.scheduler
    num_running = len(placement.attention_ranks) * scheduler.max_num_seqs
    num_tokens = sum(one.num_kv_blocks * one.block_size for one in ready)
    return [
        f"model: {info.name} ({model.architecture}, {size}), {dtype} on {device}{kernels}, "
        f"{placement_text(placement)}, schedule {scheduler.schedule}",
        f"room: max_model_len {info.max_model_len}, {num_running} sequences run and {config.max_waiting} wait, "
        f"KV cache of {num_tokens} tokens",
    ]


def placement_text(placement: PlacementConfig) -> str:
    """Which workers there are, for a person."""
    if placement.colocated:
        return f"{placement.colocated} colocated worker{'s' if placement.colocated > 1 else ''}"
    if placement.expert_workers:
        most = placement.max_expert_workers or placement.expert_workers
        room = f" (up to {most})" if most > placement.expert_workers else ""
        return f"{placement.attention_workers} attention and {placement.expert_workers} expert workers{room}"
    return "1 worker"

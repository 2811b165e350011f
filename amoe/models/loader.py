"""Load the blocks of one worker from a checkpoint directory: check everything first, then read straight into place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from amoe.config import DTypeName
from amoe.errors import CheckpointError
from amoe.models.checkpoint import Checkpoint
from amoe.models.config import ModelConfig
from amoe.models.model import Blocks, ExpertWeights, Model
from amoe.models.native_loader import load_native_experts, load_native_model
from amoe.models.native_model import NativeModel
from amoe.models.weights_builder import WeightsBuilder
from amoe.models.worker_model import WorkerModel

__all__ = [
    "Blocks",
    "check_checkpoint",
    "load_experts",
    "load_experts_for",
    "load_model",
    "load_native_model",
    "resolve_dtype",
]

_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_dtype(name: DTypeName, config: ModelConfig) -> torch.dtype:
    """The dtype to run in: `auto` is the checkpoint's.

    Raises:
        CheckpointError: `auto` with a float16 checkpoint, which has no lossless dtype to run in but float32.
    """
    wanted = config.torch_dtype if name == "auto" else name
    if wanted not in _TORCH_DTYPES:
        raise CheckpointError(f"the checkpoint's dtype is {wanted}; choose --dtype float32 or --dtype bfloat16")
    return _TORCH_DTYPES[wanted]


def load_model(
    path: str | Path,
    config: ModelConfig,
    blocks: Blocks,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    on_progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Load the tensors of `blocks`, and no others.

    Every name, shape and dtype is checked before the first tensor is read. Peak memory: the final size and one tensor.

    Args:
        path: checkpoint directory.
        config: of `load_model_config(path)`.
        dtype: that the model runs in; tensors are converted as they are read.
        on_progress: called with bytes done and bytes in all (of the files), after every tensor.

    Raises:
        CheckpointError: a file is missing or damaged; a tensor is missing, wrongly shaped or of an unsupported dtype.
    """
    device = torch.device(device)
    builder = WeightsBuilder(Checkpoint(path), config, dtype, device)
    weights = builder.build(blocks)
    builder.fill(on_progress)
    return Model(config, blocks, weights, dtype=dtype, device=device, parameter_bytes=builder.allocated_bytes)


def load_experts_for(model: WorkerModel, path: str | Path, layer: int, ids: tuple[int, ...]) -> Any:
    """Weights of some experts of one layer, for `model.set_experts`, while the model serves. Experts of that layer
    which are here already are copied instead of read. Checked as in `load_model`, before anything is read.

    Args:
        ids: global ids, ascending; may be none.

    Raises:
        CheckpointError: as `load_model`.
    """
    config, dtype = model.config, model.dtype
    if isinstance(model, NativeModel):
        held = model.weights.experts.get(layer)
        return load_native_experts(path, config, layer, ids, dtype=dtype, quantize=model.is_quantized, held=held)
    assert isinstance(model, Model)
    return load_experts(
        path, config, layer, ids, dtype=dtype, device=model.device, held=model.weights.experts.get(layer)
    )


def load_experts(
    path: str | Path,
    config: ModelConfig,
    layer: int,
    ids: tuple[int, ...],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    held: ExpertWeights | None = None,
) -> ExpertWeights:
    """Weights of some experts of one layer, while a model serves. Checked as in `load_model`, before anything is read.

    Args:
        ids: global ids, ascending; may be none.
        held: experts of that layer which are here already: they are copied instead of read.

    Raises:
        CheckpointError: as `load_model`.
    """
    builder = WeightsBuilder(Checkpoint(path), config, dtype, torch.device(device))
    held_at = {} if held is None else {expert: local for local, expert in enumerate(held.ids)}
    weights = builder.experts(layer, ids, frozenset(held_at))
    builder.fill(None)
    if held is not None:
        for local, expert in enumerate(ids):
            if expert in held_at:
                weights.w13[local].copy_(held.w13[held_at[expert]])
                weights.w2[local].copy_(held.w2[held_at[expert]])
    return weights


def check_checkpoint(path: str | Path, config: ModelConfig) -> int:
    """Check that every tensor of the model is there in its shape; reads headers only.

    Returns:
        bytes of all tensors in the checkpoint's dtypes.

    Raises:
        CheckpointError: as `load_model`.
    """
    builder = WeightsBuilder(Checkpoint(path), config, torch.float32, torch.device("meta"))
    builder.build(Blocks.whole(config))
    return builder.total_bytes

"""Which kernels a worker computes with, and its model for them."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from amoe.config import EngineConfig
from amoe.engine.cpus import thread_cpus, threads_per_worker
from amoe.errors import ConfigError
from amoe.kernels import native
from amoe.models.config import ModelConfig
from amoe.models.loader import load_model, load_native_model, resolve_dtype
from amoe.models.model import Blocks
from amoe.models.native_model import NativeModel
from amoe.models.worker_model import WorkerModel
from amoe.policy.placement import experts_of
from amoe.types import Int16Array

logger = logging.getLogger(__name__)

# Where they beat torch. With less than AVX-512 they are right, and slow: the compiler splits their vectors badly.
_FAST = frozenset({"avx512", "avx512_bf16"})


def uses_native(config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the worker computes with the kernels in `amoe.kernels.native`. Warns where they are missed on a CPU.

    Raises:
        ConfigError: they are asked for, and cannot be had.
    """
    if config.kernels == "torch":
        return False
    reason = _reason_against(model, dtype, device, quantizes=config.quantization is not None)
    is_asked = config.kernels == "native" or config.quantization is not None
    if is_asked and reason:
        asked = "--kernels native" if config.kernels == "native" else f"--quantization {config.quantization}"
        raise ConfigError(f"{asked}: {reason}")
    if not reason and native.choose_isa() not in _FAST:
        reason = f"the native kernels are fast with AVX-512 only, and this is {native.choose_isa()}"
    if reason and device.type == "cpu":
        logger.warning("%s kernels: %s", "native" if is_asked else "torch", reason)
    return is_asked or not reason


def _reason_against(model: ModelConfig, dtype: torch.dtype, device: torch.device, *, quantizes: bool) -> str:
    """Why the native kernels cannot serve; "" if they can."""
    if device.type != "cpu":
        return "the native kernels are for CPUs"
    if fault := native.fault():
        return f"the native kernels {fault}"
    widths = (
        model.hidden_size,
        model.moe_intermediate_size,
        model.intermediate_size,
        model.shared_expert_intermediate_size,
    )
    if (dtype == torch.bfloat16 or quantizes) and any(width % 2 for width in widths):
        return "the native kernels take even widths of models, experts and MLPs only"
    return ""


def kernels_text(model: WorkerModel) -> str:
    """Which kernels compute a model, for a person."""
    if not isinstance(model, NativeModel):
        return "torch kernels"
    return f"native kernels for {native.choose_isa()}{', int8 weights' if model.is_quantized else ''}"


def load_worker_model(
    config: EngineConfig,
    model_config: ModelConfig,
    owners: Int16Array,
    rank: int,
    device: torch.device,
    on_progress: Callable[[int, int], None],
) -> WorkerModel:
    """The blocks that the placement gives to worker `rank`.

    Raises:
        ConfigError, CheckpointError: they cannot be had; the message is for the user.
    """
    placement = config.placement
    experts: dict[int, tuple[int, ...]] = {}
    if rank in placement.owner_ranks:
        experts = experts_of(owners, placement.owner_ranks.index(rank), model_config.sparse_layers)
    blocks = Blocks(attention=rank in placement.attention_ranks, experts=experts)
    dtype = resolve_dtype(config.dtype, model_config)
    if not uses_native(config, model_config, dtype, device):
        return load_model(config.model, model_config, blocks, dtype=dtype, device=device, on_progress=on_progress)
    isa, quantize = native.choose_isa(), config.quantization == "int8"
    context = native.make_context(dtype, threads_per_worker(config), thread_cpus(config, rank), isa)
    logger.info("native kernels for %s, %d threads", isa, context.num_threads)
    model = load_native_model(
        config.model, model_config, blocks, context, dtype=dtype, quantize=quantize, on_progress=on_progress
    )
    # Torch's own threads would spin beside those of the kernels; what is left to it is small.
    torch.set_num_threads(1)
    return model

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
from amoe.models.worker_model import WorkerModel
from amoe.policy.placement import experts_of
from amoe.types import Int16Array

logger = logging.getLogger(__name__)

# Where they beat torch. With less than AVX-512 they are right, and slow: the compiler splits their vectors badly.
_FAST = frozenset({"avx512", "avx512_bf16"})


def uses_native(config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the worker computes with the kernels in `amoe.kernels.native`.

    Raises:
        ConfigError: they are asked for, and cannot be had.
    """
    reason = _reason_against(model, dtype, device, quantizes=config.quantization is not None)
    if config.kernels == "native" or config.quantization is not None:
        if reason:
            asked = "--kernels native" if config.kernels == "native" else f"--quantization {config.quantization}"
            raise ConfigError(f"{asked}: {reason}")
        return True
    return config.kernels == "auto" and not reason and native.choose_isa() in _FAST


def _reason_against(model: ModelConfig, dtype: torch.dtype, device: torch.device, *, quantizes: bool) -> str:
    """Why the native kernels cannot serve; "" if they can."""
    if device.type != "cpu":
        return "the native kernels are for CPUs"
    if not native.is_available():
        return "the native kernels have not been built: install a C++ compiler and amoe again"
    widths = (
        model.hidden_size,
        model.moe_intermediate_size,
        model.intermediate_size,
        model.shared_expert_intermediate_size,
    )
    if (dtype == torch.bfloat16 or quantizes) and any(width % 2 for width in widths):
        return "the native kernels take even widths of models, experts and MLPs only"
    return ""


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

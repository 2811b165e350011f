"""Builds a worker of an emulated device. Reads no weights, and of the checkpoint nothing but its configuration."""

from __future__ import annotations

import numpy as np
import torch

from amoe.config import EngineConfig
from amoe.core.worker import ModelShape, WorkerCore
from amoe.engine.assembly import Ports, Rejoin, assemble, owners_at
from amoe.engine.emulated import (
    EmulatedAttention,
    EmulatedExperts,
    RouterPool,
    Waiter,
    sleep_precisely,
    valid_vocabulary,
)
from amoe.engine.emulated_device import EmulatedDevice, emulated_length, plan_emulated_kv
from amoe.engine.expert_loading import ExpertLoading
from amoe.engine.expert_placement import placement_digest
from amoe.engine.kv_plan import KVPlan
from amoe.engine.messages import Ready
from amoe.engine.worker import Worker
from amoe.models.config import ModelConfig
from amoe.policy.placement import experts_of
from amoe.profiles.models import ModelSizes
from amoe.types import Int16Array


def build_emulated_worker(
    config: EngineConfig,
    device: EmulatedDevice,
    checkpoint: ModelConfig,
    rank: int,
    ports: Ports,
    rejoin: Rejoin | None = None,
) -> Worker:
    """Make the worker `rank`, and tell the server that it is ready.

    Raises:
        ConfigError: the model does not fit the device.
    """
    torch.set_num_threads(1)  # there is nothing to compute
    sleep_precisely()
    sizes, placement = device.sizes(checkpoint), config.placement
    config.capacity.require_effect(sizes.top_k)
    owners = owners_at(config, sizes, rejoin)
    weight_bytes = _weight_bytes(config, sizes, owners, rank)
    plan = KVPlan(0, 0)
    if rank in placement.attention_ranks:
        plan = plan_emulated_kv(config, device, sizes, emulated_length(config, checkpoint), weight_bytes)
    shape = ModelShape(sizes.sparse_layers, sizes.num_experts)
    core = WorkerCore(
        config,
        shape,
        rank,
        num_kv_blocks=plan.num_blocks,
        max_model_len=plan.max_model_len,
        owners=owners,
        incarnation=0 if rejoin is None else rejoin.incarnation,
        incarnations=None if rejoin is None else rejoin.topology.incarnations,
    )
    costs, waiter = device.costs(sizes, rank), Waiter()
    attention = experts = loading = None
    if core.attention is not None:
        rng = np.random.default_rng((device.seed, rank))
        vocabulary = valid_vocabulary(checkpoint.vocab_size, checkpoint.eos_token_ids)
        router = RouterPool(device.routing(sizes), rng, with_scores=config.may_degrade)
        attention = EmulatedAttention(
            sizes, costs, device.context(sizes), router, core.attention.batcher, vocabulary, rng, waiter
        )
    if core.experts is not None:
        num_slots = len(placement.attention_ranks) * config.scheduler.num_token_slots
        held = _held(config, sizes, owners, rank)
        experts = EmulatedExperts(sizes, costs, num_slots, waiter, held, weight_bytes - _expert_bytes(sizes, held))
        loading = ExpertLoading(
            experts, core.experts, sizes.sparse_layers, sizes.num_experts, is_late=rejoin is not None
        )
    worker = assemble(
        config,
        checkpoint,
        core,
        attention,
        experts,
        (sizes.num_layers, sizes.num_experts),
        ports,
        lambda: waiter.modelled_s,
        loading,
    )
    digest = placement_digest(owners)
    ready = Ready(
        plan.max_model_len,
        plan.num_blocks,
        config.cache.block_size,
        int(weight_bytes),
        digest,
        ports.transport.address,
    )
    ports.control.send(ready)
    return worker


def _weight_bytes(config: EngineConfig, sizes: ModelSizes, owners: Int16Array, rank: int) -> float:
    """Of the blocks that the worker holds."""
    placement, total = config.placement, 0.0
    if rank in placement.attention_ranks:
        total += sizes.attention_bytes
    return total + _expert_bytes(sizes, _held(config, sizes, owners, rank))


def _expert_bytes(sizes: ModelSizes, held: dict[int, tuple[int, ...]]) -> float:
    return sum(len(experts) for experts in held.values()) * sizes.expert_bytes


def _held(config: EngineConfig, sizes: ModelSizes, owners: Int16Array, rank: int) -> dict[int, tuple[int, ...]]:
    """{layer: ids} of the experts that the worker holds."""
    placement = config.placement
    if rank not in placement.owner_ranks:
        return {}
    return experts_of(owners, placement.owner_ranks.index(rank), sizes.sparse_layers)

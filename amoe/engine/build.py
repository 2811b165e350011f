"""Builds a worker: reads the checkpoint, sizes the KV cache, wires core, executors and transport together."""

from __future__ import annotations

import torch

from amoe.clock import Clock, MonotonicClock
from amoe.config import EngineConfig
from amoe.core.worker import ModelShape, WorkerCore
from amoe.engine.assembly import Ports, Rejoin, assemble, owners_at
from amoe.engine.build_emulated import build_emulated_worker
from amoe.engine.cpus import threads_per_worker
from amoe.engine.devices import resolve_device
from amoe.engine.emulated_device import emulated_device
from amoe.engine.executor import AttentionExecutor, ExpertsExecutor
from amoe.engine.expert_loading import ExpertLoading
from amoe.engine.expert_placement import placement_digest
from amoe.engine.forward import ForwardExecutor
from amoe.engine.kv_plan import KVPlan
from amoe.engine.memory import free_bytes, longest_sequence, plan_kv_cache
from amoe.engine.messages import ControlPort, Loading, Ready
from amoe.engine.model_loading import kernels_text, load_worker_model
from amoe.engine.roles import role_of
from amoe.engine.worker import Worker
from amoe.models.checkpoint import checkpoint_digest
from amoe.models.config import ModelConfig, load_model_config
from amoe.models.worker_model import PagedCache, WorkerModel
from amoe.transport.base import Transport
from amoe.types import Int16Array


def build_worker(
    config: EngineConfig,
    rank: int,
    transport: Transport,
    control: ControlPort,
    clock: Clock | None = None,
    rejoin: Rejoin | None = None,
) -> Worker:
    """Make the worker `rank`, telling the server of the progress, and at last that it is ready.

    Args:
        rejoin: others serve already; None: it starts with them.

    Raises:
        ConfigError, CheckpointError: it cannot be made; the message is for the user.
    """
    ports = Ports(transport=transport, control=control, clock=clock or MonotonicClock())
    model_config = load_model_config(config.model)
    emulated = emulated_device(config)
    if emulated is not None:
        return build_emulated_worker(config, emulated, model_config, rank, ports, rejoin)
    torch.set_num_threads(threads_per_worker(config))
    config.capacity.require_effect(model_config.top_k)
    longest_sequence(config, model_config)  # refuses in a second what would be refused once the weights are loaded
    device = resolve_device(config.device, rank)
    owners = owners_at(config, model_config, rejoin)
    model = load_worker_model(
        config, model_config, owners, rank, device, lambda done, total: control.send(Loading(done, total))
    )
    plan, kv = KVPlan(0, 0), None
    if role_of(config, rank) != "experts":
        num_sharing = _num_homes_on(config, device)
        plan = plan_kv_cache(config, model_config, model.dtype, free_bytes(device), num_sharing)
        kv = model.new_kv_cache(plan.num_blocks, config.cache.block_size, plan.max_model_len)
    worker = _wire(config, model_config, owners, rank, model, kv, plan, ports, rejoin)
    digest = placement_digest(owners)
    ready = Ready(
        plan.max_model_len,
        plan.num_blocks,
        config.cache.block_size,
        model.parameter_bytes,
        digest,
        transport.address,
        checkpoint_digest(config.model),
        kernels_text(model),
    )
    control.send(ready)
    return worker


def _num_homes_on(config: EngineConfig, device: torch.device) -> int:
    """Attention workers that share this worker's memory."""
    return sum(1 for rank in config.placement.attention_ranks if resolve_device(config.device, rank) == device)


def _wire(
    config: EngineConfig,
    model_config: ModelConfig,
    owners: Int16Array,
    rank: int,
    model: WorkerModel,
    kv: PagedCache | None,
    plan: KVPlan,
    ports: Ports,
    rejoin: Rejoin | None,
) -> Worker:
    shape = ModelShape(model_config.sparse_layers, model_config.num_experts, model_config.norm_topk_prob)
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
    placement, slots = config.placement, config.scheduler.num_token_slots
    experts = loading = None
    if core.experts is not None:
        experts = ExpertsExecutor(model, len(placement.attention_ranks), slots, config.model)
        loading = ExpertLoading(
            experts, core.experts, model_config.sparse_layers, model_config.num_experts, is_late=rejoin is not None
        )
    attention = forward = None
    if core.forward is not None and kv is not None:
        forward = ForwardExecutor(model, kv, core.forward.batcher, ports.clock)
    if core.attention is not None and kv is not None:
        local_slab = None
        if experts is not None:
            index = placement.attention_ranks.index(rank)
            local_slab = experts.slab[index * slots : (index + 1) * slots]
        num_owners = len(placement.owner_ranks)
        attention = AttentionExecutor(
            model,
            kv,
            core.attention.batcher,
            num_owners,
            model_config.sparse_layers,
            local_slab,
            with_scores=config.may_degrade,
        )
    sizes = (model_config.num_layers, model_config.num_experts)
    return assemble(config, model_config, core, attention, experts, sizes, ports, loading=loading, forward=forward)

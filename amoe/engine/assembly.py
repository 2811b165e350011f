"""What every worker is put together from, whatever runs its blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from amoe.clock import Clock
from amoe.config import EngineConfig
from amoe.core.worker import WorkerCore
from amoe.engine.attention_side import AttentionSide
from amoe.engine.cpus import threads_per_worker
from amoe.engine.emulated_device import Shape
from amoe.engine.executor import AttentionBlocks, ExpertBlocks, HeadBlock
from amoe.engine.expert_loading import ExpertLoading
from amoe.engine.expert_placement import expert_owners
from amoe.engine.forward import ForwardExecutor
from amoe.engine.grammar_compiler import GrammarCompiler, GrammarVocabulary
from amoe.engine.home import Home, HomeCore
from amoe.engine.messages import ControlPort, Topology
from amoe.engine.roles import role_of
from amoe.engine.sampling_table import SamplingTable
from amoe.engine.structured import Grammars
from amoe.engine.topology import roster_of
from amoe.engine.worker import Worker
from amoe.engine.worker_stats import StatsKeeper
from amoe.models.config import ModelConfig
from amoe.policy.patience import Patience
from amoe.transport.base import Transport
from amoe.types import Int16Array


@dataclass(frozen=True, kw_only=True, slots=True)
class Ports:
    """How a worker reaches the world."""

    transport: Transport
    control: ControlPort
    clock: Clock


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejoin:
    """What a worker is told that is started while others serve.

    Attributes:
        incarnation: which life of its rank it is.
        topology: in force as it is started; it is not in it yet, but its experts are.
    """

    incarnation: int
    topology: Topology


def owners_at(config: EngineConfig, shape: Shape, rejoin: Rejoin | None) -> Int16Array:
    """[num_layers, num_experts, R] where experts live as a worker starts: with the others, or later.

    Raises:
        ConfigError: see `expert_owners`.
    """
    return expert_owners(config, shape) if rejoin is None else roster_of(rejoin.topology, shape.num_experts).owners


def assemble(
    config: EngineConfig,
    checkpoint: ModelConfig,
    core: WorkerCore,
    attention: AttentionBlocks | None,
    experts: ExpertBlocks | None,
    num_layers_experts: tuple[int, int],
    ports: Ports,
    modelled_s: Callable[[], float] = lambda: 0.0,
    loading: ExpertLoading | None = None,
    forward: ForwardExecutor | None = None,
) -> Worker:
    """A worker around `core`.

    Args:
        checkpoint: vocabulary and ends of sequence.
        attention, experts, forward: what runs the blocks that the core holds.
        num_layers_experts: of the model that is served.
        loading: changes which experts `experts` holds, where there are any.
    """
    home = side = None
    if core.forward is not None and forward is not None:
        home = _home(config, checkpoint, core.forward, forward, ports)
    if core.attention is not None and attention is not None:
        owner_of_rank = {owner_rank: owner for owner, owner_rank in enumerate(config.placement.owner_ranks)}
        home = _home(config, checkpoint, core.attention, attention, ports)
        side = AttentionSide(core.attention, attention, owner_of_rank)
    return Worker(
        core,
        home,
        side,
        experts,
        transport=ports.transport,
        control=ports.control,
        clock=ports.clock,
        stats=StatsKeeper(
            core.rank, role_of(config, core.rank), *num_layers_experts, modelled_s, ridge_tokens=config.ridge_tokens
        ),
        sign_s=Patience(config.failure.timeout_s).sign_s,
        may_compile=config.device.startswith("cuda"),
        loading=loading,
        forward=forward,
    )


def _home(config: EngineConfig, checkpoint: ModelConfig, core: HomeCore, head: HeadBlock, ports: Ports) -> Home:
    return Home(
        core,
        head,
        SamplingTable(config.scheduler.max_num_seqs, checkpoint.vocab_size),
        ports.control,
        _grammars(config, checkpoint),
        eos_token_ids=checkpoint.eos_token_ids,
        seed=config.seed,
        clock=ports.clock,
        has_capacity=config.may_degrade,
    )


def _grammars(config: EngineConfig, checkpoint: ModelConfig) -> Grammars:
    vocabulary = GrammarVocabulary(config.model, checkpoint.vocab_size, checkpoint.eos_token_ids)
    return Grammars(GrammarCompiler(vocabulary), checkpoint.vocab_size, threads_per_worker(config))

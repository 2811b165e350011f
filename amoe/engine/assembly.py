"""What every worker is put together from, whatever runs its blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from amoe.clock import Clock
from amoe.config import EngineConfig
from amoe.core.worker import WorkerCore
from amoe.engine.devices import threads_per_worker
from amoe.engine.executor import AttentionBlocks, ExpertBlocks
from amoe.engine.grammar_compiler import GrammarCompiler, GrammarVocabulary
from amoe.engine.home import Home
from amoe.engine.messages import ControlPort
from amoe.engine.sampling_table import SamplingTable
from amoe.engine.structured import Grammars
from amoe.engine.worker import Worker
from amoe.engine.worker_stats import StatsKeeper
from amoe.models.config import ModelConfig
from amoe.transport.base import Transport


@dataclass(frozen=True, kw_only=True, slots=True)
class Ports:
    """How a worker reaches the world."""

    transport: Transport
    control: ControlPort
    clock: Clock


def role_of(config: EngineConfig, rank: int) -> str:
    """ "attention", "experts", or "colocated" for both."""
    is_home, is_owner = rank in config.placement.attention_ranks, rank in config.placement.expert_ranks
    return "colocated" if is_home and is_owner else "attention" if is_home else "experts"


def assemble(
    config: EngineConfig,
    checkpoint: ModelConfig,
    core: WorkerCore,
    attention: AttentionBlocks | None,
    experts: ExpertBlocks | None,
    num_layers_experts: tuple[int, int],
    ports: Ports,
    modelled_s: Callable[[], float] = lambda: 0.0,
) -> Worker:
    """A worker around `core`.

    Args:
        checkpoint: vocabulary and ends of sequence.
        attention, experts: what runs the blocks that the core holds.
        num_layers_experts: of the model that is served.
    """
    home = None
    if core.attention is not None and attention is not None:
        home = Home(
            core.attention,
            attention,
            SamplingTable(config.scheduler.max_num_seqs, checkpoint.vocab_size),
            ports.control,
            _grammars(config, checkpoint),
            owner_of_rank={owner_rank: owner for owner, owner_rank in enumerate(config.placement.expert_ranks)},
            eos_token_ids=checkpoint.eos_token_ids,
            seed=config.seed,
            clock=ports.clock,
        )
    return Worker(
        core,
        home,
        experts,
        transport=ports.transport,
        control=ports.control,
        clock=ports.clock,
        stats=StatsKeeper(
            core.rank, role_of(config, core.rank), *num_layers_experts, modelled_s, ridge_tokens=config.ridge_tokens
        ),
    )


def _grammars(config: EngineConfig, checkpoint: ModelConfig) -> Grammars:
    vocabulary = GrammarVocabulary(config.model, checkpoint.vocab_size, checkpoint.eos_token_ids)
    return Grammars(GrammarCompiler(vocabulary), checkpoint.vocab_size, threads_per_worker(config))

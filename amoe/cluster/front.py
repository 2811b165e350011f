"""An engine in front of a local cluster: what the server, the benchmarks and the tests start."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from amoe.cluster.local import LocalCluster
from amoe.config import EngineConfig
from amoe.engine.async_engine import AsyncEngine, ModelInfo
from amoe.engine.emulated_device import served_shape
from amoe.engine.messages import Ready
from amoe.engine.tokenizer import Tokenizer
from amoe.engine.watchdog import HEARTBEAT_TIMEOUT_S, STALL_TIMEOUT_S
from amoe.models.config import load_model_config


def model_info(config: EngineConfig, ready: Sequence[Ready], name: str) -> ModelInfo:
    """What a front must know of the model that the workers of `config` have loaded."""
    # Expert workers have no say in the length of a sequence: they have no KV cache.
    longest = min(ready[rank].max_model_len for rank in config.placement.attention_ranks)
    sizes = served_shape(config)
    return ModelInfo(
        name=name,
        max_model_len=longest,
        vocab_size=load_model_config(config.model).vocab_size,
        num_moe_layers=sum(sizes.sparse_layers),
        pairs_per_token=config.capacity.pairs_per_token(sizes.top_k, sizes.num_experts),
    )


def connect_engine(
    cluster: LocalCluster,
    ready: Sequence[Ready],
    *,
    name: str,
    tokenizer: Tokenizer,
    heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S,
    stall_timeout_s: float = STALL_TIMEOUT_S,
) -> AsyncEngine:
    """An engine that listens to the workers of a started cluster, and dies with any of them.

    Args:
        ready: what `LocalCluster.start` returned.
        name: of the model, as users see it.
        heartbeat_timeout_s, stall_timeout_s: see `amoe.engine.watchdog`.
    """
    engine = AsyncEngine(
        cluster.channels,
        cluster.config,
        tokenizer,
        model_info(cluster.config, ready, name),
        owners=cluster.owners,
        heartbeat_timeout_s=heartbeat_timeout_s,
        stall_timeout_s=stall_timeout_s,
    )
    cluster.on_death = lambda _, reason: engine.die(reason)
    engine.run()
    return engine


@contextlib.asynccontextmanager
async def running_engine(config: EngineConfig) -> AsyncIterator[tuple[AsyncEngine, LocalCluster]]:
    """An engine and its workers, which are gone afterwards.

    Raises:
        ConfigError, CheckpointError: it cannot work.
        EngineDeadError: a worker failed while it started.
    """
    tokenizer = Tokenizer(config.model)
    cluster = LocalCluster(config)
    ready = await cluster.start()
    try:
        engine = connect_engine(cluster, ready, name=Path(config.model).name, tokenizer=tokenizer)
        try:
            yield engine, cluster
        finally:
            await engine.close()
    finally:
        await cluster.stop()

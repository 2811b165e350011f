"""The engine on real worker processes, without HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from amoe.cluster.local import LocalCluster
from amoe.config import EngineConfig
from amoe.engine.async_engine import AsyncEngine, ModelInfo
from amoe.engine.generation import GenerationDelta
from amoe.engine.tokenizer import Tokenizer
from amoe.models.config import load_model_config
from amoe.types import SamplingParams


@asynccontextmanager
async def running_engine(config: EngineConfig) -> AsyncIterator[tuple[AsyncEngine, LocalCluster]]:
    """Start the workers of `config`, and stop them in the end."""
    cluster = LocalCluster(config)
    try:
        ready = await cluster.start()
        longest = min(ready[rank].max_model_len for rank in config.placement.attention_ranks)
        model = ModelInfo(name="test", max_model_len=longest, vocab_size=load_model_config(config.model).vocab_size)
        engine = AsyncEngine(cluster.channels, config, Tokenizer(config.model), model)
        cluster.on_death = lambda _, reason: engine.die(reason)
        engine.run()
        try:
            yield engine, cluster
        finally:
            await engine.close()
    finally:
        await cluster.stop(5)


async def generate(
    engine: AsyncEngine, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> list[GenerationDelta]:
    """All prompts at once, to their end: one merged delta each."""

    async def one(prompt: Sequence[int]) -> GenerationDelta:
        total = GenerationDelta()
        async for delta in engine.generate(prompt, params):
            total.merge(delta)
        return total

    return list(await asyncio.gather(*(one(prompt) for prompt in prompts)))

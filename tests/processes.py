"""The engine on real worker processes, without HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from amoe.engine.async_engine import AsyncEngine
from amoe.engine.generation import GenerationDelta
from amoe.types import SamplingParams


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

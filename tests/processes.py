"""The engine on real worker processes, without HTTP; and what it leaves behind."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import psutil

from amoe.engine.async_engine import AsyncEngine
from amoe.engine.generation import GenerationDelta
from amoe.types import SamplingParams
from benchmarks.chaos.residue import descriptors

_PATIENCE_S = 15.0


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


class Holding(NamedTuple):
    """What this process holds: descriptors by what they are, names in /dev/shm, processes below it."""

    descriptors: Counter[str]
    names: set[str]
    children: set[psutil.Process]

    @classmethod
    def now(cls) -> Holding:
        gc.collect()  # what earlier tests have dropped must not make room for what these leave
        children = set(psutil.Process().children(recursive=True))
        return cls(descriptors(os.getpid()), set(os.listdir("/dev/shm")), children)

    def beyond(self, before: Holding) -> list[object]:
        """What was not there before."""
        opened = self.descriptors - before.descriptors
        is_more = self.descriptors.total() > before.descriptors.total()
        return [
            what for what in (is_more and opened, self.names - before.names, self.children - before.children) if what
        ]


@contextmanager
def nothing_more() -> Iterator[None]:
    """What is held after the block was held before it; at the latest some seconds after it, for other tests on this
    machine use /dev/shm as well."""
    before = Holding.now()
    yield
    deadline = time.monotonic() + _PATIENCE_S
    while (left := Holding.now().beyond(before)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []

"""Attention workers of a real cluster are killed under streams of all kinds: every stream says what it would have said.

First one of two, whose sequences go on at the other; then, before it is back, that one as well, so that all wait.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
from llguidance import LLMatcher

from amoe.cluster.front import running_engine
from amoe.config import CacheConfig, EngineConfig, PlacementConfig, SchedulerConfig
from amoe.engine.async_engine import AsyncEngine
from amoe.engine.generation import GenerationDelta
from amoe.types import SamplingParams
from tests.checkpoints import make_checkpoint

MAX_TOKENS = 80
RANDOM = {"temperature": 1.2}
OPTIONS = (
    {},
    RANDOM,
    RANDOM | {"top_p": 0.9, "min_p": 0.01, "logprobs": 2},
    RANDOM | {"presence_penalty": 0.7, "frequency_penalty": 0.2, "repetition_penalty": 1.2},
    {"prompt_logprobs": 1, "logprobs": 0},
    {"return_routed_experts": True},
    RANDOM | {"min_tokens": 60, "ignore_eos": False},
    RANDOM | {"bad_words": ((5, 6), (40,)), "logit_bias": ((41, 3.0),)},
    RANDOM | {"grammar": LLMatcher.grammar_from_regex("([a-f]{2}[0-9])*!"), "ignore_eos": False},
    RANDOM | {"stop": ("qq", "zz", "~~")},
)
PROMPTS = [[3 + (5 * index + 7 * place * place) % 97 for place in range(12 + index)] for index in range(len(OPTIONS))]
CHOICES = 2


def requests() -> list[tuple[list[int], SamplingParams]]:
    """Two choices of each prompt."""
    return [
        (
            prompt,
            SamplingParams(
                **{"max_tokens": MAX_TOKENS, "temperature": 0.0, "seed": choice, "ignore_eos": True} | options
            ),
        )
        for prompt, options in zip(PROMPTS, OPTIONS, strict=True)
        for choice in range(CHOICES)
    ]


async def run_all(engine: AsyncEngine, on_tokens: Callable[[int], None]) -> list[GenerationDelta]:
    """All requests at once, to their end. `on_tokens` hears how many tokens come."""

    async def read(generation) -> GenerationDelta:
        total = GenerationDelta()
        async for delta in generation:
            total.merge(delta)
            on_tokens(len(delta.token_ids))
        return total

    generations = [item for pair in _pairs(requests()) for item in engine.start(pair)]
    return list(await asyncio.gather(*map(read, generations)))


def _pairs(items: list) -> list[list]:
    return [items[start : start + CHOICES] for start in range(0, len(items), CHOICES)]


def check(told: GenerationDelta, expected: GenerationDelta) -> None:
    for name in ("text", "token_ids", "finish_reason", "stop_reason", "num_prompt_tokens", "num_generated_tokens"):
        assert getattr(told, name) == getattr(expected, name), name
    for name in ("logprobs", "prompt_logprobs"):
        before, after = getattr(expected, name), getattr(told, name)
        assert len(before) == len(after)
        assert np.allclose([item.logprob for item in before], [item.logprob for item in after], atol=1e-3)
    assert len(told.routed_experts) == len(expected.routed_experts)


async def test_streams_survive_the_death_of_every_attention_worker(tmp_path: Path) -> None:
    config = EngineConfig(
        model=str(make_checkpoint(tmp_path / "model", "qwen3_moe", seed=0, eos_token_id=2)),
        dtype="float32",
        threads_per_worker=1,
        max_model_len=256,
        placement=PlacementConfig(attention_workers=2, expert_workers=1),
        scheduler=SchedulerConfig(max_num_seqs=16),
        cache=CacheConfig(num_blocks=400),
    )
    async with running_engine(config) as (engine, cluster):
        expected = await run_all(engine, lambda _: None)
        victims = [(200, cluster.pids[0]), (400, cluster.pids[1])]
        num_tokens = 0

        def kill_in_time(count: int) -> None:
            nonlocal num_tokens
            num_tokens += count
            if victims and num_tokens >= victims[0][0]:
                os.kill(victims.pop(0)[1], signal.SIGKILL)

        told = await run_all(engine, kill_in_time)
        assert not victims
        assert engine.num_open == 0
        assert engine._load.is_empty
        readmitted = [
            engine.metrics.registry.get_sample_value(
                "amoe:requests_readmitted_total", {"model_name": "model", "engine": str(rank)}
            )
            for rank in (0, 1)
        ]
        assert all(readmitted)
    for result, item in zip(told, expected, strict=True):
        check(result, item)

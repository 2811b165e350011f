"""Attention workers of a real cluster are killed under streams of all kinds: every stream says what it would have said.

First one of two, whose sequences go on at the other; then, before it is back, that one as well, so that all wait. Or
the only worker there is, which runs all layers in one step, and then its next life.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Literal, cast

import numpy as np
import pytest
from llguidance import LLMatcher

from amoe.cluster.front import running_engine
from amoe.cluster.launcher import WorkerHandle
from amoe.cluster.worker_process import WorkerProcess
from amoe.config import CacheConfig, DTypeName, EngineConfig, PlacementConfig, SchedulerConfig
from amoe.engine.async_engine import AsyncEngine
from amoe.engine.generation import GenerationDelta
from amoe.kernels import native
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
NUM_BLOCKS = 34  # of 16 tokens: too few for all
IS_BATCH_INVARIANT = native.is_available() and native.choose_isa() in ("avx512", "avx512_bf16")  # what `auto` takes
needs_native = pytest.mark.skipif(not IS_BATCH_INVARIANT, reason="torch's kernels round by the size of a batch")


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
    """All that a user sees is the same; to the last bit, where kernels do not round by the size of a batch."""
    for name in ("text", "token_ids", "finish_reason", "stop_reason", "num_prompt_tokens", "num_generated_tokens"):
        assert getattr(told, name) == getattr(expected, name), name
    for name in ("logprobs", "prompt_logprobs"):
        before, after = getattr(expected, name), getattr(told, name)
        assert len(before) == len(after)
        assert np.allclose([item.logprob for item in before], [item.logprob for item in after], atol=1e-3)
        assert not IS_BATCH_INVARIANT or before == after, name
    assert len(told.routed_experts) == len(expected.routed_experts)
    assert not IS_BATCH_INVARIANT or told.routed_experts == expected.routed_experts


SEVERAL = PlacementConfig(attention_workers=2, expert_workers=1)
ALONE = PlacementConfig()  # the schedule `forward`
KILL, STOP = signal.SIGKILL, signal.SIGSTOP
# What happens to which attention worker.
DEATHS = {"several": (SEVERAL, ((0, KILL), (1, KILL))), "alone": (ALONE, ((0, KILL), (0, STOP)))}


@pytest.mark.parametrize(
    ("deaths", "dtype", "quantization"),
    [
        ("several", "float32", None),
        pytest.param("alone", "float32", None, marks=pytest.mark.matrix),
        pytest.param("alone", "bfloat16", "int8", marks=needs_native),
        pytest.param("several", "bfloat16", None, marks=[needs_native, pytest.mark.matrix]),
    ],
)
async def test_streams_survive_the_death_of_every_attention_worker(
    deaths: str, dtype: DTypeName, quantization: Literal["int8"] | None, tmp_path: Path
) -> None:
    placement, victims = DEATHS[deaths]
    config = EngineConfig(
        model=str(make_checkpoint(tmp_path / "model", "qwen3_moe", seed=0, eos_token_id=2)),
        dtype=dtype,
        quantization=quantization,
        threads_per_worker=1,
        max_model_len=256,
        placement=placement,
        scheduler=SchedulerConfig(max_num_seqs=16),
        cache=CacheConfig(num_blocks=NUM_BLOCKS),
    )
    assert (config.scheduler.schedule == "forward") == (deaths == "alone")
    async with running_engine(config) as (engine, cluster):
        expected = await run_all(engine, lambda _: None)
        num_tokens, waiting = 0, [(200 * number, *victim) for number, victim in enumerate(victims, 1)]
        hurt: set[WorkerHandle] = set()

        def hurt_in_time(count: int) -> None:
            nonlocal num_tokens
            num_tokens += count
            if not waiting or num_tokens < waiting[0][0]:
                return
            _, rank, number = waiting[0]
            worker = cluster.workers.get(rank)
            # What a dead worker has said last may be read when its next life is not there yet: that is hurt later.
            if worker is not None and worker not in hurt:
                os.kill(cast(WorkerProcess, worker).pid, number)
                hurt.add(worker)
                waiting.pop(0)

        told = await run_all(engine, hurt_in_time)
        assert not waiting
        # Memory is so short that sequences are preempted, which workers tell with their next sign of life.
        while not _metric(engine, "amoe:num_preemptions_total"):  # noqa: ASYNC110 - the metric tells nobody
            await asyncio.sleep(0.05)
        assert engine.num_open == 0
        assert engine._load.is_empty
        readmitted = [
            engine.metrics.registry.get_sample_value(
                "amoe:requests_readmitted_total", {"model_name": "model", "engine": str(rank)}
            )
            for rank in placement.attention_ranks
        ]
        assert all(readmitted)
    for result, item in zip(told, expected, strict=True):
        check(result, item)


def _metric(engine: AsyncEngine, name: str) -> float:
    """Summed over all labels."""
    families = engine.metrics.registry.collect()
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)

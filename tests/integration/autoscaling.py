"""A load that grows and shrinks, and a number of expert workers that follows it by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from amoe.builtin import builtin_model_path
from amoe.cluster.front import Front
from amoe.config import AutoscaleConfig, EngineConfig, PlacementConfig, ScheduleName, SchedulerConfig
from amoe.policy import autoscaling
from amoe.types import SamplingParams

PROMPT = [5, 6, 7, 8] * 16  # whose tokens wait for one another: that is no crowd
PARAMS = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes a minute takes some seconds; the bounds are what they always are."""
    monkeypatch.setattr(autoscaling, "SUSTAIN_S", 1.5)
    monkeypatch.setattr(autoscaling, "COOLDOWN_S", 1.0)
    monkeypatch.setattr(autoscaling, "IDLE_S", 1.5)


def autoscaled(schedule: ScheduleName) -> EngineConfig:
    """One or two expert workers, with the default bound, on emulated devices whose experts are what tokens wait for."""
    return EngineConfig(
        model=str(builtin_model_path()),
        device="emulated:h100,slow=100,model=olmoe-1b-7b",
        placement=PlacementConfig(attention_workers=1, expert_workers=1, max_expert_workers=2),
        scheduler=SchedulerConfig(schedule=schedule),
        autoscale=AutoscaleConfig(min_workers=1, max_workers=2),
    )


async def check_that_it_follows(front: Front) -> None:
    """A crowd brings another worker, and a lone user sends it away. Everybody is answered, also who came in the middle
    of a change."""
    assert front.admin is not None
    async with _streams(front, 1) as alone:
        await asyncio.sleep(2 * autoscaling.SUSTAIN_S)
        assert front.admin.status().num_expert_workers == 1
    async with _streams(front, 24) as crowd:
        await _number_becomes(front, 2)
        assert [worker.role for worker in front.admin.status().workers] == ["attention", "experts", "experts"]
    async with _streams(front, 1) as alone_again:
        await _number_becomes(front, 1)
    assert {*alone, *crowd, *alone_again} == {PARAMS.max_tokens}


@asynccontextmanager
async def _streams(front: Front, count: int) -> AsyncIterator[list[int]]:
    """So many requests at any time. Yields the tokens of each that has been answered."""
    answered: list[int] = []
    is_over = False

    async def one() -> None:
        while not is_over:
            deltas = [delta async for delta in front.engine.generate(PROMPT, PARAMS)]
            answered.append(sum(len(delta.token_ids) for delta in deltas))

    tasks = [asyncio.create_task(one()) for _ in range(count)]
    yield answered
    is_over = True
    await asyncio.gather(*tasks)


async def _number_becomes(front: Front, count: int) -> None:
    """Waits until there are so many expert workers, and nothing else is to be done."""
    assert front.admin is not None
    while (status := front.admin.status()).num_expert_workers != count or status.action:  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0.05)

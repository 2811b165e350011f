"""Token-exactness again, with worker processes, shared memory and the async engine; and what they leave behind."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from amoe.cluster.front import running_engine
from amoe.config import EngineConfig, FailureConfig, PlacementConfig, SchedulerConfig
from amoe.engine.async_engine import AsyncEngine
from amoe.errors import EngineDeadError
from amoe.types import SamplingParams
from tests.integration.exactness import FACTORS, Case, assert_exact, checkpoint, make_cases
from tests.pairwise import all_combinations, pairwise
from tests.processes import generate

_PROCESS_FACTORS = {name: FACTORS[name] for name in ("schedule", "count", "placement")}
# One architecture and feature per cell, in turn; the in-process tests have covered their combinations.
_REST = [("olmoe", "cached"), ("builtin", "preempted"), ("qwen2_moe", "plain"), ("qwen3_moe", "cached+preempted")]


def _cases(rows: list[dict]) -> list[Case]:
    rest = [
        {"arch": _REST[i % 4][0], "feature": _REST[i % 4][1], "variant": i % 3, "replicas": 2 * (i % 2)}
        for i in range(len(rows))
    ]
    return make_cases([{**row, **more} for row, more in zip(rows, rest, strict=True)])


CELLS = all_combinations(_PROCESS_FACTORS)
SELECTION = _cases([row for index, row in enumerate(CELLS) if index % 17 == 0])
MATRIX = make_cases(pairwise(FACTORS))


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


async def run_case(case: Case, root: Path) -> None:
    async with running_engine(case.config(checkpoint(root, case.arch, case.variant))) as (engine, _):
        for _ in range(2 if "cached" in case.feature else 1):
            results = await generate(engine, case.prompts, case.params)
            logprobs = [[entry.logprob for entry in result.logprobs] for result in results]
            assert_exact(case, root, [result.token_ids for result in results], logprobs)


@pytest.mark.parametrize("case", SELECTION, ids=str)
async def test_selection(case: Case, root: Path) -> None:
    await run_case(case, root)


@pytest.mark.matrix
@pytest.mark.parametrize("case", MATRIX, ids=str)
async def test_matrix(case: Case, root: Path) -> None:
    await run_case(case, root)


def small_config(root: Path, **placement: int) -> EngineConfig:
    return EngineConfig(model=str(checkpoint(root, "qwen3_moe", 0)), placement=PlacementConfig(**placement))


async def wait_for(condition, what: str) -> None:
    for _ in range(1200):
        if condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"never happened: {what}")


def kv_blocks_in_use(engine: AsyncEngine) -> float:
    lines = engine.metrics.render().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("amoe:kv_cache_usage_perc"))


async def test_leaving_early_frees_the_sequence(root: Path) -> None:
    async with running_engine(small_config(root, colocated=2)) as (engine, _):
        params = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
        async for delta in engine.generate([5, 6, 7], params):
            if delta.num_generated_tokens >= 3:
                break
        await wait_for(lambda: engine.num_open == 0, "the engine forgets the request")
        await wait_for(lambda: kv_blocks_in_use(engine) == 0, "the worker frees its blocks")


async def test_in_lockstep_a_killed_worker_ends_every_request_with_an_error(root: Path) -> None:
    """All wait for all there: nobody could go on. See test_supervision.py for the other schedules."""
    config = replace(small_config(root, expert_workers=1), scheduler=SchedulerConfig(schedule="lockstep"))
    async with running_engine(config) as (engine, cluster):
        params = SamplingParams(max_tokens=250, temperature=0.0, ignore_eos=True)
        generation = aiter(engine.generate([5, 6, 7], params))
        await anext(generation)
        psutil.Process(cluster.pids[1]).kill()
        with pytest.raises(EngineDeadError, match="expert"):
            async for _ in generation:
                pass
        assert not engine.healthy


async def test_a_stopped_home_does_not_hold_up_the_waves_of_the_other(root: Path) -> None:
    config = replace(
        small_config(root, attention_workers=2, expert_workers=1),
        scheduler=SchedulerConfig(schedule="waves", num_waves=1, max_hold_s=0.2),
        failure=FailureConfig(timeout_s=600.0),  # nobody replaces it
    )
    params = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)
    async with running_engine(config) as (engine, cluster):
        expected = [result.token_ids for result in await generate(engine, [[5, 6, 7]], params)]
        psutil.Process(cluster.pids[1]).suspend()
        try:
            tasks = [asyncio.ensure_future(generate(engine, [[5, 6, 7]], params)) for _ in range(2)]
            done, _ = await asyncio.wait(tasks, timeout=30, return_when=asyncio.FIRST_COMPLETED)
            assert len(done) == 1, "one of them is at the home that goes on"
        finally:
            psutil.Process(cluster.pids[1]).resume()
        for results in await asyncio.gather(*tasks):
            assert [result.token_ids for result in results] == expected


async def test_a_stopped_worker_makes_the_engine_unhealthy_until_it_goes_on(root: Path) -> None:
    """SIGSTOP: the process lives, its loop does not turn; and nobody replaces it."""
    config = replace(small_config(root, colocated=2), failure=FailureConfig(timeout_s=600.0))
    async with running_engine(config) as (engine, cluster):
        assert engine.healthy
        engine._watchdog.stall_timeout_s = 2.0
        psutil.Process(cluster.pids[1]).suspend()
        try:
            await wait_for(lambda: not engine.healthy, "the watchdog notices")
        finally:
            psutil.Process(cluster.pids[1]).resume()
        await wait_for(lambda: engine.healthy, "it goes on")

"""Real workers that die: what is served meanwhile, how they come back, and what is left in the end."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from amoe.cluster.front import Front, serving
from amoe.cluster.local import LocalCluster
from amoe.config import EngineConfig, FailureConfig, PlacementConfig
from amoe.engine.tokenizer import Tokenizer
from amoe.types import SamplingParams
from benchmarks.chaos.residue import children_of
from benchmarks.chaos.server import SPARE
from tests.checkpoints import make_checkpoint
from tests.processes import generate, nothing_more

PARAMS = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)
PROMPTS = [[5 + index, 6, 7] for index in range(8)]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No descriptor, child or name in /dev/shm."""
    with nothing_more():
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("supervision") / "model", "qwen3_moe", seed=3)


def cluster_of(model: Path, placement: PlacementConfig, max_crashes: int = 100) -> LocalCluster:
    failure = FailureConfig(backoff_s=0.1, max_crashes=max_crashes)
    return LocalCluster(EngineConfig(model=str(model), placement=placement, threads_per_worker=1, failure=failure))


def serve(cluster: LocalCluster):
    return serving(cluster, name="m", tokenizer=Tokenizer(cluster.config.model))


async def until(condition: Callable[[], bool], what: str) -> None:
    for _ in range(6000):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"never: {what}")


def state_of(front: Front, rank: int) -> tuple[str, int]:
    assert front.admin is not None
    status = front.admin.status().workers[rank]
    return status.state, status.incarnation


async def outputs(front: Front) -> list[list[int]]:
    return [result.token_ids for result in await generate(front.engine, PROMPTS, PARAMS)]


async def disturb(front: Front, cluster: LocalCluster, faults: dict[int, signal.Signals]) -> list[list[int]]:
    """Outputs while signals go to workers, by rank; afterwards others serve in their places."""
    pids = {rank: cluster.pids[rank] for rank in faults}
    lives = {rank: state_of(front, rank)[1] for rank in faults}
    disturbed = asyncio.create_task(outputs(front))
    await until(lambda: front.engine.num_open > 0, "requests are open")
    for rank, number in faults.items():
        os.kill(pids[rank], number)
    result = await disturbed
    for rank in faults:
        await until(lambda rank=rank: state_of(front, rank) == ("serving", lives[rank] + 1), "another one serves")
        assert not psutil.pid_exists(pids[rank])
    assert (front.engine.healthy, front.engine.note) == (True, "")
    return result


async def test_nobody_notices(model: Path) -> None:
    cluster = cluster_of(model, PlacementConfig(attention_workers=2, expert_workers=1))
    async with serve(cluster) as front:
        expected = await outputs(front)
        for faults in (
            {2: signal.SIGKILL},
            {0: signal.SIGKILL},
            {2: signal.SIGSTOP},
            {1: signal.SIGKILL, 2: signal.SIGKILL},
        ):
            assert await disturb(front, cluster, faults) == expected, faults


async def test_nobody_notices_that_all_was_lost(model: Path) -> None:
    """The only worker there is."""
    cluster = cluster_of(model, PlacementConfig())
    async with serve(cluster) as front:
        expected = await outputs(front)
        assert await disturb(front, cluster, {0: signal.SIGKILL}) == expected


async def test_a_crash_loop_is_told_and_ends_with_its_cause(model: Path, tmp_path: Path) -> None:
    """The checkpoint goes away while the server runs, and comes back."""
    path, aside = tmp_path / "model", tmp_path / "aside"
    shutil.copytree(model, path)
    cluster = cluster_of(path, PlacementConfig(expert_workers=1), max_crashes=2)
    async with serve(cluster) as front:
        expected = await outputs(front)
        weights = next(path.glob("*.safetensors"))
        weights.rename(aside)
        os.kill(cluster.pids[1], signal.SIGKILL)
        waiting = asyncio.create_task(outputs(front))
        await until(lambda: "has died" in front.engine.trouble, "the crash loop is told")
        assert front.engine.trouble.startswith("expert 0 has died ")
        assert "safetensors" in front.engine.trouble
        assert not front.engine.healthy
        aside.rename(weights)
        assert await waiting == expected


async def test_a_spare_takes_the_place(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has imported everything, and waits; the next one waits afterwards, and none is left in the end."""
    monkeypatch.setattr("amoe.cluster.local.SPARE_DELAY_S", 0.0)
    config = cluster_of(model, PlacementConfig()).config
    cluster = LocalCluster(replace(config, failure=replace(config.failure, warm_spare=True)))

    def spares() -> set[int]:
        return {child.pid for title, child in children_of(os.getpid()) if title == SPARE}

    async with serve(cluster) as front:
        expected = await outputs(front)
        await until(lambda: len(spares()) == 1, "somebody waits")
        first = spares()
        assert await disturb(front, cluster, {0: signal.SIGKILL}) == expected
        assert set(cluster.pids) == first
        assert "amoe: worker 0" in " ".join(psutil.Process(cluster.pids[0]).cmdline())
        await until(lambda: len(spares()) == 1, "the next one waits")
        os.kill(spares().pop(), signal.SIGKILL)  # nobody notices: the next life is started as ever
        assert await disturb(front, cluster, {0: signal.SIGKILL}) == expected


async def test_stop_in_the_middle_of_a_start(model: Path) -> None:
    cluster = cluster_of(model, PlacementConfig(expert_workers=1))
    async with serve(cluster) as front:
        pid = cluster.pids[1]
        os.kill(pid, signal.SIGKILL)
        await until(lambda: state_of(front, 1) == ("starting", 1) and 1 in cluster.workers, "the next one is starting")
        starting = cluster.pids[1]
        assert starting != pid
    assert not psutil.pid_exists(starting)

"""Worker processes: they start, say why if they cannot, and are gone afterwards, whatever ended them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from amoe.cluster.local import LocalCluster, ring_bytes_for
from amoe.cluster.process import title_of
from amoe.config import EngineConfig, PlacementConfig, SchedulerConfig
from amoe.engine.messages import AbortRequests, Loading, Ready
from amoe.errors import CheckpointError, ConfigError, EngineDeadError
from amoe.models.config import load_model_config
from tests.processes import nothing_more

HERE = Path(__file__).parent
TWO = PlacementConfig(attention_workers=1, expert_workers=1)
ONE = PlacementConfig()  # starting a worker costs seconds of processor time: mostly imports


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Workers find `fake_worker`; afterwards no descriptor, child or name in /dev/shm is left."""
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    with nothing_more():
        yield


def cluster_of(mode: str, placement: PlacementConfig = TWO) -> LocalCluster:
    config = EngineConfig(model=mode, placement=placement)
    return LocalCluster(config, entry="fake_worker:build_worker", ring_bytes=1 << 20)


def wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def test_start_serve_stop() -> None:
    cluster = cluster_of("ping", PlacementConfig(attention_workers=1, expert_workers=2))
    progress: list[tuple[int, int]] = []
    ready = await cluster.start(lambda done, total: progress.append((done, total)))
    assert ready == [Ready(128, 16, 16, 100 + rank) for rank in range(3)]
    assert progress[-1] == (300, 300)
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    assert len(cluster.channels) == len(set(cluster.pids)) == 3
    for rank, channel in enumerate(cluster.channels):
        channel.send(AbortRequests([41]))
        assert await anext(channel) == Loading(41, rank)
    assert all(os.getsid(pid) == pid for pid in cluster.pids)
    titles = [" ".join(psutil.Process(pid).cmdline()).rstrip() for pid in cluster.pids]
    assert titles == ["amoe: attention 0", "amoe: expert 0", "amoe: expert 1"]
    pids = cluster.pids
    await cluster.stop()
    assert all(is_gone(pid) for pid in pids)
    await cluster.stop()


@pytest.mark.parametrize(
    ("placement", "titles"),
    [
        (PlacementConfig(), ["worker 0"]),
        (PlacementConfig(colocated=2), ["worker 0", "worker 1"]),
        (
            PlacementConfig(attention_workers=2, expert_workers=2),
            ["attention 0", "attention 1", "expert 0", "expert 1"],
        ),
    ],
)
def test_title_of(placement: PlacementConfig, titles: list[str]) -> None:
    assert [title_of(placement, rank) for rank in range(placement.num_workers)] == titles


async def test_user_error_is_the_workers_message_and_no_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    cluster = cluster_of("user-error")
    with pytest.raises(ConfigError, match=r"^model\.safetensors: tensor lm_head\.weight is missing$"):
        await cluster.start()
    assert "Traceback" not in capfd.readouterr().err


async def test_bug_at_start_is_told_with_a_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EngineDeadError, match="could not start: ZeroDivisionError: a bug"):
        await cluster_of("bug", ONE).start()
    assert "Traceback" in capfd.readouterr().err


async def test_death_at_start_tells_status_and_last_words() -> None:
    with pytest.raises(EngineDeadError, match=r"exited with status 7 while starting\n  \| the last words") as info:
        await cluster_of("exit", ONE).start()
    assert "pid" in str(info.value)


async def test_checkpoint_is_looked_at_before_any_process_starts(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        await LocalCluster(EngineConfig(model=str(tmp_path / "none"))).start()


async def test_cancelled_start_leaves_nothing() -> None:
    cluster = cluster_of("slow", ONE)
    loading = asyncio.Event()
    starting = asyncio.create_task(cluster.start(lambda done, total: loading.set()))
    await loading.wait()
    pids = cluster.pids
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert all(is_gone(pid) for pid in pids)


async def test_death_of_a_worker_is_told() -> None:
    deaths: asyncio.Queue[tuple[int, str]] = asyncio.Queue()
    cluster = cluster_of("crash")
    cluster.on_death = lambda rank, reason: deaths.put_nowait((rank, reason))
    await cluster.start()
    first, second = cluster.pids
    cluster.channels[1].send(AbortRequests([1]))
    assert await deaths.get() == (1, f"expert 0 (pid {second}) was killed by SIGSEGV")
    assert [message async for message in cluster.channels[1]] == []
    os.kill(first, signal.SIGKILL)
    assert await deaths.get() == (0, f"attention 0 (pid {first}) was killed by SIGKILL")
    await cluster.stop()
    assert deaths.empty()


async def test_sigterm_to_a_worker_is_an_orderly_stop_and_sigint_nothing() -> None:
    deaths: asyncio.Queue[tuple[int, str]] = asyncio.Queue()
    cluster = cluster_of("serve", ONE)
    cluster.on_death = lambda rank, reason: deaths.put_nowait((rank, reason))
    await cluster.start()
    (pid,) = cluster.pids
    os.kill(pid, signal.SIGINT)
    cluster.channels[0].send(AbortRequests([5]))
    assert await anext(cluster.channels[0]) == Loading(5, 0)
    os.kill(pid, signal.SIGTERM)
    assert await deaths.get() == (0, f"worker 0 (pid {pid}) exited with status 0")
    await cluster.stop()


async def test_deaf_worker_is_killed_after_the_grace() -> None:
    cluster = cluster_of("deaf", ONE)
    await cluster.start()
    await asyncio.wait_for(cluster.stop(grace_s=0.2), 60)


class Parent:
    """`cluster_parent.py` in a process of its own."""

    def __init__(self, mode: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "cluster_parent.py"), mode], stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Parent:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def expect(self, word: str) -> list[int]:
        """Read lines until one begins with `word`; returns the pids that follow."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.split()[0] == word:
                return [int(pid) for pid in line.split()[1:]]
        raise AssertionError(f"the parent ended without saying {word!r}")


def test_sigterm_stops_in_order() -> None:
    with Parent("serve") as parent:
        pids = parent.expect("ready")
        parent.process.send_signal(signal.SIGTERM)
        parent.expect("stopped")
        assert parent.process.wait(60) == 0
        assert all(is_gone(pid) for pid in pids)


def test_second_sigint_kills() -> None:
    with Parent("deaf") as parent:
        pids = parent.expect("ready")
        parent.process.send_signal(signal.SIGINT)
        parent.expect("draining")
        assert not any(is_gone(pid) for pid in pids)
        parent.process.send_signal(signal.SIGINT)
        assert parent.process.wait(60) == 130
        wait_until(lambda: all(is_gone(pid) for pid in pids), "all workers are gone")


@pytest.mark.parametrize(("mode", "word"), [("deaf", "ready"), ("slow", "loading")])
def test_kill_9_of_the_parent_leaves_nothing(mode: str, word: str) -> None:
    with Parent(mode) as parent:
        pids = parent.expect(word)
        assert len(pids) == 2
        parent.process.kill()
        wait_until(lambda: all(is_gone(pid) for pid in pids), "all workers are gone")


def test_rings_hold_all_that_a_home_may_send(checkpoint_factory: Callable[..., Path]) -> None:
    model = load_model_config(checkpoint_factory("olmoe"))
    small = EngineConfig(model="m", scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16))
    large = EngineConfig(model="m", scheduler=SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=2048))
    assert ring_bytes_for(small, model) >= 20 * model.hidden_size * 4
    assert ring_bytes_for(large, model) >= 2304 * model.hidden_size * 4

"""What can be said of workers on Ray without a Ray cluster."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from ray.exceptions import RayError

from amoe.cluster import environment
from amoe.cluster.executor import ExecutorOptions
from amoe.cluster.ray_cluster import launcher, metrics, placement, session
from amoe.cluster.ray_cluster.actor import Whereabouts, kill_process, software, started_at
from amoe.cluster.ray_cluster.handle import describe_death
from amoe.cluster.ray_cluster.placement import Room, needs_of, threads_for
from amoe.config import EngineConfig, PlacementConfig
from amoe.errors import ConfigError, EngineDeadError
from amoe.logs import LogOptions


def config(**options) -> EngineConfig:
    placement = PlacementConfig(attention_workers=1, expert_workers=2)
    return EngineConfig(model="m", transport="tcp", placement=placement, **options)


@pytest.mark.parametrize(
    ("free_cpus", "threads"),
    [([12], 4), ([11], 3), ([6, 6], 3), ([5, 5, 5], 5), ([8, 1], 2), ([2], 1), ([], 1), ([4.5, 4.5], 2)],
)
def test_threads_are_as_many_as_the_nodes_have_room_for(free_cpus, threads):
    assert threads_for(free_cpus, config()) == threads
    assert threads_for(free_cpus, config(threads_per_worker=7)) == 7
    assert threads_for(free_cpus, config(device="cuda")) == 1


def test_resources_of_a_worker():
    assert needs_of(config(), "experts", 3, is_pinned=False) == {"CPU": 3.0}
    needs = needs_of(config(device="cuda"), "attention", 1, is_pinned=True)
    assert needs == {"CPU": 1.0, "GPU": 1.0, "amoe_attention": 0.001}


def test_variables_for_other_hosts():
    """What is meant for workers goes along; secrets of the server, and what is of this host, do not."""
    given = {
        "NCCL_DEBUG": "INFO",
        "HF_HOME": "/cache",
        "AMOE_LOGGING_LEVEL": "debug",
        "AMOE_API_KEY": "secret",
        "AMOE_ADMIN_KEY": "secret",
        "HF_TOKEN": "secret",
        "OMP_NUM_THREADS": "64",
        "OMP_WAIT_POLICY": "ACTIVE",
        "PATH": "/bin",
    }
    found = environment.remote(3, given)
    assert "secret" not in found.values() and "PATH" not in found
    assert found["NCCL_DEBUG"] == "INFO" and found["HF_HOME"] == "/cache" and found["AMOE_LOGGING_LEVEL"] == "debug"
    assert found["OMP_NUM_THREADS"] == found["MKL_NUM_THREADS"] == "3"
    assert found["OMP_WAIT_POLICY"] == "ACTIVE"


def test_variables_on_this_host():
    """All but the server's secrets: whoever reads a worker's environment learns none."""
    given = {"AMOE_API_KEY": "secret", "AMOE_ADMIN_KEY": "secret", "PATH": "/bin", "OMP_NUM_THREADS": "64"}
    found = environment.inherited(3, given)
    assert "secret" not in found.values()
    assert found["PATH"] == "/bin" and found["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The actor died because its node has died. Node Id: 5", "is lost with its node"),
        ("The actor is dead because it was killed by `ray.kill`.", "was killed"),
        ("its worker process has died. Worker exit type: SYSTEM_ERROR", "died: it was killed, or crashed"),
        ("Worker exit type: INTENDED_USER_EXIT", "was ended by Ray"),
        ("Traceback\n  ...\nValueError: that is wrong", "failed: ValueError: that is wrong"),
        ("", "failed: RayError"),
    ],
)
def test_deaths_are_told_in_few_words(text, words):
    assert describe_death(RayError(text)) == words


def test_only_the_very_process_is_killed():
    pid = os.getpid()
    assert started_at(pid) is not None
    assert kill_process(pid, "0") is False, "another process had that number before"
    assert kill_process(2**22 + 1, "0") is False
    assert started_at(2**22 + 1) is None


def test_software_that_workers_must_share():
    found = software()
    assert set(found) == {"Python", "torch", "amoe"} and "missing" not in found.values()
    assert found == software()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://10.0.0.1:10001", "a Ray client is no part of the cluster"),
        ("10.0.0.1", "is not HOST:PORT"),
        ("10.0.0.1:http", "is not HOST:PORT"),
        (":6379", "is not HOST:PORT"),
    ],
)
async def test_addresses_that_cannot_be(address, message):
    with pytest.raises(ConfigError) as error:
        await session._check_address(address)
    assert message in str(error.value)


@pytest.fixture
def ray_directory(monkeypatch, tmp_path: Path) -> Path:
    """Where `ray start` announces itself; nothing is there."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (directory := tmp_path / "ray").mkdir()
    return directory


async def test_without_a_ray_none_is_found(ray_directory):
    assert await session._running_here() is None
    (ray_directory / "ray_current_cluster").write_text("", encoding="utf-8")
    assert await session._running_here() is None
    (ray_directory / "ray_current_cluster").write_text("nonsense", encoding="utf-8")
    assert await session._running_here() is None


async def test_what_ray_start_announces_is_found(ray_directory):
    """Until it has ended, even if it was killed."""
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        (ray_directory / "ray_current_cluster").write_text(address, encoding="utf-8")
        assert await session._running_here() == address
    assert await session._running_here() is None


async def test_a_ray_that_is_not_announced_is_not_joined(ray_directory, monkeypatch):
    """Its process may be another program's."""
    with socket.create_server(("127.0.0.1", 0)) as head:
        found = {f"127.0.0.1:{head.getsockname()[1]}"}
        monkeypatch.setattr("ray._private.services.find_gcs_addresses", lambda: found)
        assert await session._running_here() is None


@pytest.mark.parametrize(
    ("flag", "variable"), [("ray://h:10001", ""), ("nonsense", "10.0.0.1:6379"), (None, "h:99999")]
)
def test_an_address_is_refused_before_ray_is_imported(flag, variable):
    with pytest.raises(ConfigError, match="--ray-address"):
        ExecutorOptions(name="ray", ray_address=flag).check_address({"RAY_ADDRESS": variable})


@pytest.mark.parametrize("address", ["auto", "local", "10.0.0.1:6379", "[::1]:6379", "", None])
def test_addresses_that_can_be(address):
    ExecutorOptions(name="ray", ray_address=address).check_address({})
    ExecutorOptions(name="ray").check_address({"RAY_ADDRESS": address or ""})
    ExecutorOptions().check_address({"RAY_ADDRESS": "nonsense"})


def test_what_is_refused_imports_neither_ray_nor_torch():
    flags = ["serve", "--executor", "ray"]
    for more in (["--transport", "shm"], ["--ray-address", "nonsense"]):
        code = (
            "import sys; from amoe.cli import main\n"
            f"status = main({flags + more!r})\n"
            "print(status, sorted({'ray', 'torch'} & set(sys.modules)))"
        )
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert ran.stdout == "2 []\n", ran.stderr


def test_ray_says_nothing_of_a_signal_handler():
    told = logging.LogRecord("r", logging.WARNING, "", 0, "SIGTERM handler is not set because", None, None)
    other = logging.LogRecord("r", logging.WARNING, "", 0, "%s is full", ("the disk",), None)
    assert not session._is_worth_telling(told) and session._is_worth_telling(other)


async def test_calls_go_through_one_thread_and_their_errors_come_back():
    thread = session.RayThread()
    order: list[int] = []

    def fail() -> None:
        raise KeyError("x")

    thread.post(fail)  # nobody waits for it
    results = await asyncio.gather(*(thread.call(lambda i=i: order.append(i) or i) for i in range(5)))
    assert results == order == [0, 1, 2, 3, 4]
    with pytest.raises(KeyError):
        await thread.call(fail)
    thread.close()


class FakeGroups:
    """Placement groups; those named in `full` never find room."""

    def __init__(self, monkeypatch, full: set[str]) -> None:
        self.made: list[str] = []
        self.removed: list[str] = []
        self._full = full
        monkeypatch.setattr(placement, "placement_group", self._make)
        monkeypatch.setattr(placement, "remove_placement_group", lambda group: self.removed.append(group.name))

    def _make(self, bundles, strategy, name):
        self.made.append(name)
        return SimpleNamespace(name=name, wait=lambda seconds: name not in self._full)


class TestRoom:
    def room(self, monkeypatch, *full: str, timeout_s: float = 0.0) -> tuple[Room, FakeGroups, session.RaySession]:
        ray_session = session.RaySession(session.RayThread(), "127.0.0.1", is_ours=False)
        monkeypatch.setattr(Room, "_complaint", no_room)
        groups = FakeGroups(monkeypatch, {f"amoe/d/{name}" for name in full})
        needs = {"attention": {"CPU": 1.0}, "experts": {"CPU": 1.0}}
        return Room(ray_session, config(), "d", needs, timeout_s), groups, ray_session

    async def test_is_given_back(self, monkeypatch):
        room, groups, ray_session = self.room(monkeypatch)
        await room.reserve()
        await room.place_of(3)
        room.leave(1)
        room.leave(3)
        await ray_session.thread.call(lambda: None)
        assert groups.removed == ["amoe/d/experts-3"]
        await room.close()
        await ray_session.close()
        assert sorted(groups.removed) == sorted(groups.made)

    async def test_whoever_finds_too_little_keeps_none_of_it(self, monkeypatch):
        room, groups, ray_session = self.room(monkeypatch, "experts")
        with pytest.raises(ConfigError, match="no room"):
            await room.reserve()
        await room.close()
        await ray_session.thread.call(lambda: None)
        assert sorted(groups.removed) == sorted(groups.made) == ["amoe/d/attention", "amoe/d/experts"]

    async def test_what_a_worker_waits_for_is_told(self, monkeypatch):
        room, _, ray_session = self.room(monkeypatch)
        monkeypatch.setattr(ray_session, "nodes", nodes_of({"CPU": 2.0}))
        monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 0.5})
        assert "needs 1 CPU; Ray knows 1 node(s), with 0.5 CPU free" in await room.shortage(2)
        monkeypatch.setattr(placement, "_SHORTAGE_TIMEOUT_S", 0.01)
        gone = threading.Event()
        monkeypatch.setattr("ray.available_resources", gone.wait)
        assert "the head of the Ray cluster does not answer" in await room.shortage(2)
        gone.set()
        await ray_session.close()

    @pytest.mark.parametrize("turns", [0, 1, 20], ids=["not begun", "being made", "waiting"])
    async def test_whoever_is_cancelled_leaves_none(self, monkeypatch, turns):
        room, groups, ray_session = self.room(monkeypatch, "experts-3", timeout_s=60)
        looking = asyncio.create_task(room.place_of(3))
        for _ in range(turns):
            await asyncio.sleep(0)
        looking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await looking
        await ray_session.thread.call(lambda: None)
        assert groups.removed == groups.made
        groups._full.clear()
        await room.place_of(3)
        await room.close()
        assert groups.removed == groups.made


def nodes_of(*resources: dict[str, float]) -> Callable[[], Awaitable[list[dict[str, Any]]]]:
    async def nodes() -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": each} for each in resources]

    return nodes


async def test_a_worker_that_waits_for_room_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """First in the log, in the end as the reason why it could not be started, and meanwhile it may still come."""
    monkeypatch.setattr(launcher, "TELL_AFTER_S", 0.01)
    monkeypatch.setattr(launcher, "START_TIMEOUT_S", 0.05)
    monkeypatch.setattr(Room, "shortage", no_room)
    ray_session = session.RaySession(session.RayThread(), "127.0.0.1", is_ours=False)
    ours = launcher.RayLauncher(ray_session, config(), ExecutorOptions(name="ray"), "m:f", LogOptions())
    with pytest.raises(EngineDeadError, match=r"expert 0: Ray has not started its actor within .* s: no room"):
        await ours._once_started(1, asyncio.get_running_loop().create_future())
    assert "expert 0: Ray has not started its actor for 0.01 s: no room" in caplog.text
    monkeypatch.setattr(launcher, "START_TIMEOUT_S", 60.0)
    found: asyncio.Future[Whereabouts] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(0.05, found.set_result, Whereabouts("10.0.0.3", "node", 5, "1", {}))
    assert (await ours._once_started(1, found)).pid == 5
    await ray_session.close()


async def no_room(*_args) -> str:
    return "no room"


class FakeMetric:
    """What Ray would export, by its name there and the values of its labels."""

    exported: dict[tuple[str, ...], float]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        assert ":" not in name and description
        self.name, self.tag_keys = name, tag_keys

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self.tag_keys)
        self.exported[(f"ray_{self.name}", *tags.values())] = value

    def inc(self, value: float, tags: dict[str, str]) -> None:
        key = (f"ray_{self.name}_total", *tags.values())
        self.exported[key] = self.exported.get(key, 0.0) + value


def test_metrics_are_copied_to_rays(monkeypatch):
    exported: dict[tuple[str, ...], float] = {}
    monkeypatch.setattr(FakeMetric, "exported", exported, raising=False)
    monkeypatch.setattr(metrics, "Gauge", FakeMetric)
    monkeypatch.setattr(metrics, "Counter", FakeMetric)
    registry = CollectorRegistry()
    running = Gauge("amoe:running", "now", ["engine"], registry=registry)
    tokens = Counter("amoe:tokens", "so far", ["engine"], registry=registry)
    seconds = Histogram("amoe:seconds", "each", registry=registry)
    Counter("amoe:pairs", "many", ["expert"], registry=registry).labels("3").inc()
    copy = metrics.RayMetrics()
    for value in (2, 0):
        running.labels("0").set(value)
        tokens.labels("0").inc(5)
        seconds.observe(1.5)
        copy.take(registry.collect())
    assert exported == {
        ("ray_amoe_running", "0"): 0.0,
        ("ray_amoe_tokens_total", "0"): 10.0,
        ("ray_amoe_seconds_count_total",): 2.0,
        ("ray_amoe_seconds_sum_total",): 3.0,
    }

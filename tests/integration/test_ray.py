"""Workers as actors of a Ray cluster of two nodes on this host: replaced when they die, gone when the server is, and
clear when it cannot work. Attention workers are pinned to one node and expert workers to the other.

That they are exact: `test_ray_exact.py`; nodes on different hosts: `test_network_engine.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from amoe.cluster.cluster import WorkerCluster
from amoe.cluster.front import Front
from amoe.cluster.ray_cluster import session
from amoe.cluster.ray_cluster.actor import started_at
from amoe.cluster.ray_cluster.handle import RayWorker
from amoe.cluster.ray_cluster.session import NAMESPACE
from amoe.errors import ConfigError
from tests.integration.exactness import Case, checkpoint
from tests.ray_nodes import CPUS_PER_NODE, OTHER_TAKES, check, running, two_nodes
from tests.served import ServedModel

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with two_nodes() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray")


def actor(workers: WorkerCluster, rank: int) -> RayWorker:
    worker = workers.workers[rank]
    assert isinstance(worker, RayWorker)
    return worker


def actor_names() -> set[str]:
    return {found["name"] for found in ray.util.list_named_actors(all_namespaces=True)}


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    ray.init(address, namespace=NAMESPACE, logging_level="warning")
    try:
        yield
    finally:
        ray.shutdown()


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def until_holds(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.1)


async def until_serving(front: Front, rank: int, incarnation: int) -> None:
    """The worker serves in that life, or in a later one."""
    assert front.admin is not None
    while True:
        status = {worker.rank: worker for worker in front.admin.status().workers}.get(rank)
        if status is not None and status.state == "serving" and status.incarnation >= incarnation:
            return
        await asyncio.sleep(0.05)


async def test_workers_are_replaced_added_and_removed(cluster: Cluster, root: Path) -> None:
    """One is killed, one is stopped, another one comes and goes: what was asked meanwhile is exact."""
    case = Case("waves", 0, "mixtral", "1A1E", "plain", 2)
    config = replace(case.config(checkpoint(root, case.arch, case.variant)), transport="tcp")
    config = replace(config, placement=replace(config.placement, max_expert_workers=2))
    async with running(cluster.address, config) as (front, workers):
        for rank, number in ((1, signal.SIGKILL), (0, signal.SIGSTOP)):
            before = actor(workers, rank).where
            asked = asyncio.create_task(check(front, case, root))
            await asyncio.sleep(0)
            os.kill(before.pid, number)
            await asked
            await until_serving(front, rank, 1)
            assert actor(workers, rank).where.node_id == before.node_id
            assert started_at(before.pid) != before.started
        assert front.admin is not None
        asked = asyncio.create_task(check(front, case, root))
        await front.admin.scale_experts(2)
        await asked
        assert "amoe/amoe/experts-2" in actor_names()
        asked = asyncio.create_task(check(front, case, root))
        await front.admin.scale_experts(1)
        await asked
        await check(front, case, root)
        assert actor_names() == {"amoe/amoe/attention-0", "amoe/amoe/experts-1"}
    assert not ray.is_initialized()


async def test_a_lost_node(cluster: Cluster, root: Path) -> None:
    """kill -9 of all that is Ray's there, its workers among it: the next life starts at another one that takes it."""
    case = Case("waves", 0, "qwen3_moe", "1A1E", "plain", 1)
    config = replace(case.config(checkpoint(root, case.arch, case.variant)), transport="tcp")
    cluster.add_node(num_cpus=CPUS_PER_NODE, resources=OTHER_TAKES)
    async with running(cluster.address, config) as (front, workers):
        before = actor(workers, 1).where
        (lost,) = [node for node in cluster.worker_nodes if node.node_id == before.node_id]
        asked = asyncio.create_task(check(front, case, root))
        await asyncio.sleep(0)
        await asyncio.to_thread(cluster.remove_node, lost, False)
        await asked
        await until_serving(front, 1, 1)
        assert actor(workers, 1).where.node_id != before.node_id
        await check(front, case, root)


def test_nothing_survives_the_server(cluster: Cluster) -> None:
    """kill -9 of the driver, which is the server and the supervisor: Ray ends its actors, and their names are free."""
    flags = (
        "--executor",
        "ray",
        "--ray-address",
        cluster.address,
        "--expert-workers",
        "1",
        "--threads-per-worker",
        "1",
    )
    names = ("amoe/gone/attention-0", "amoe/gone/experts-1")
    with ServedModel(*flags, "--deployment-name", "gone") as server:
        assert server.works()
        with connected(cluster.address):
            actors = [ray.get_actor(name) for name in names]
            pids = [where.pid for where in ray.get([actor.whereabouts.remote() for actor in actors])]
            del actors
            server.process.kill()
            until_holds(lambda: not any(map(psutil.pid_exists, pids)), "the workers are gone")
            until_holds(lambda: not actor_names().intersection(names), "their names are free")


async def test_too_little_room_is_told(cluster: Cluster, root: Path) -> None:
    case = Case("waves", 0, "mixtral", "1A1E", "plain", 2)
    config = replace(case.config(checkpoint(root, case.arch, case.variant)), transport="tcp", threads_per_worker=64)
    with pytest.raises(ConfigError) as error:
        async with running(cluster.address, config, ray_placement_timeout_s=0.5):
            pass
    for words in ("worker(s) of 64 CPU", "2 node(s)", f"{CPUS_PER_NODE} CPU", "fewer --threads-per-worker"):
        assert words in str(error.value)
    assert not ray.is_initialized()


async def test_a_deployment_that_is_there_already(cluster: Cluster, root: Path) -> None:
    """Whoever comes second is told to take another name, and the first one serves on."""
    case = Case("waves", 0, "mixtral", "1A1E", "plain", 2)
    config = replace(case.config(checkpoint(root, case.arch, case.variant)), transport="tcp", threads_per_worker=1)
    async with running(cluster.address, config) as (front, _):
        with pytest.raises(ConfigError, match=r"amoe/amoe/.*: another server has this --deployment-name: choose"):
            async with running(cluster.address, config):
                pass
        async with running(cluster.address, config, deployment="another") as (other, _):
            await asyncio.gather(check(front, case, root), check(other, case, root))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


class Refused:
    """An `amoe serve` at an address where no Ray is, which says so while other tests run."""

    def __init__(self, address: str) -> None:
        self.address = address
        command = [
            sys.executable,
            "-m",
            "amoe.cli",
            "serve",
            "--port",
            "0",
            "--executor",
            "ray",
            "--ray-address",
            address,
        ]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def words(self) -> str:
        """What it has told the user. It has left with the status for what the user can mend."""
        output, _ = self._process.communicate(timeout=60)
        assert self._process.returncode == 2 and "Traceback" not in output
        return output

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module", autouse=True)
def at_nobodys_address() -> Iterator[Refused]:
    with contextlib.closing(Refused(f"127.0.0.1:{free_port()}")) as refused:
        yield refused


@pytest.fixture(scope="module", autouse=True)
def at_a_strangers_address() -> Iterator[Refused]:
    """Who listens there takes connections, and says nothing."""
    silent = socket.create_server(("127.0.0.1", 0))
    with silent, contextlib.closing(Refused(f"127.0.0.1:{silent.getsockname()[1]}")) as refused:
        yield refused


def test_an_address_where_nobody_listens(at_nobodys_address: Refused) -> None:
    words = at_nobodys_address.words()
    assert f"no Ray cluster answers at {at_nobodys_address.address}" in words and "ray start --head" in words


async def test_without_an_announced_ray_one_is_started(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """That of the other tests runs here, and is left alone."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with tempfile.TemporaryDirectory(prefix="amoe-ray-", ignore_cleanup_errors=True) as directory:
        monkeypatch.setenv("RAY_TMPDIR", directory)
        with caplog.at_level("INFO", "amoe"):
            opened = await session.RaySession.open(None, 1)
        try:
            assert [node["Resources"]["CPU"] for node in await opened.nodes()] == [1]
        finally:
            await opened.close()
    assert "starting a Ray of our own on this host" in caplog.text and "SIGTERM" not in caplog.text


# The head of a Ray of its own is stopped; then the command ends.
LEFT_ALONE = """
import asyncio, os, signal, sys
import ray
from amoe import cli
from amoe.cluster.ray_cluster import session

async def serve():
    opened = await session.RaySession.open("local", 1)
    processes = ray._private.worker._global_node.all_processes
    pids = {kind: processes[kind][0].process.pid for kind in ("gcs_server", "raylet")}
    print(*(f"process {pid}" for pid in pids.values()))
    os.kill(pids["gcs_server"], signal.SIGSTOP)
    await opened.close()
    return 7

session.CLOSE_TIMEOUT_S = 1.0
cli._run = lambda argv: asyncio.run(serve())
sys.exit(cli.main())
"""


def test_a_ray_of_our_own_that_does_not_answer(tmp_path: Path) -> None:
    """It ends with the server, which ends with its own status and says so."""
    output = tmp_path / "output"  # no pipe, which Ray's processes would hold open
    with tempfile.TemporaryDirectory(prefix="amoe-ray-", ignore_cleanup_errors=True) as directory:
        environment = {**os.environ, "RAY_TMPDIR": directory}
        with output.open("w") as file:
            command = [sys.executable, "-c", LEFT_ALONE]
            done = subprocess.run(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=120, check=False
            )
    words = output.read_text()
    assert done.returncode == 7, words
    assert "has not answered for 1 s: our Ray ends with this process" in words
    pids = [int(pid) for pid in re.findall(r"process (\d+)", words)]
    assert len(pids) == 2
    until_holds(lambda: all(map(is_gone, pids)), "its processes are gone")


def test_an_address_that_is_no_rays(at_a_strangers_address: Refused) -> None:
    assert f"Ray at {at_a_strangers_address.address} has not answered within 20 s" in at_a_strangers_address.words()

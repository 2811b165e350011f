"""Workers as actors of a Ray cluster of two nodes on this host: replaced when they die, gone when the server is, and
clear when it cannot work. Attention workers are pinned to one node and expert workers to the other.

That they are exact: `test_ray_exact.py`; nodes on different hosts: `test_network_engine.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
import yaml
from ray.cluster_utils import Cluster

from amoe.builtin import builtin_model_path
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

SERVE_YAML = Path(__file__).parents[2] / "deploy" / "ray" / "serve.yaml"


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


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


class Served:
    """`deploy/ray/serve.yaml` as Ray Serve runs it, but for the model's path and the port."""

    def __init__(self, address: str, directory: Path) -> None:
        config = yaml.safe_load(SERVE_YAML.read_text(encoding="utf-8"))
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        config["http_options"] |= {"host": "127.0.0.1", "port": port}
        config["applications"][0]["args"] |= {"model": str(builtin_model_path()), "dtype": "float32"}
        (file := directory / "serve.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [sys.executable, "-m", "ray.serve.scripts", "run", "--address", address, str(file)]
        self._log = (directory / "serve.log").open("w+")
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)

    def until_healthy(self) -> None:
        while True:
            assert self._process.poll() is None, self.output()
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            time.sleep(0.2)

    def output(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def close(self) -> None:
        """As Ctrl-C does: the application is deleted, and with it its workers."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(60)
        self._log.close()


@pytest.fixture
def served(cluster: Cluster, tmp_path: Path) -> Iterator[Served]:
    with contextlib.closing(Served(cluster.address, tmp_path)) as served:
        served.until_healthy()
        yield served


def until(served: Served, *, num_requests_running: int) -> None:
    """As `/load` tells it, which hears of the workers twice a second."""
    while httpx.get(f"{served.url}/load").json()["num_requests_running"] != num_requests_running:
        time.sleep(0.05)


def stream(url: str, body: dict[str, Any]) -> Iterator[str]:
    with httpx.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}, timeout=60) as response:
        assert response.status_code == 200
        yield from (line.removeprefix("data: ") for line in response.iter_lines() if line)


def test_an_application_of_ray_serve(served: Served) -> None:
    """It streams; it says what is wrong with a request, and who it is; a client that goes frees what it had."""
    body = {"prompt": "def add(a, b):", "max_tokens": 12, "temperature": 0}
    *chunks, done = stream(served.url, body)
    assert done == "[DONE]" and len(chunks) >= 12, "a chunk per token"
    text = "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)
    whole = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60).json()
    assert whole["choices"][0]["text"] == text and whole["model"] == "model"
    refused = httpx.post(f"{served.url}/v1/completions", json={"prompt": "a", "max_tokens": "x"})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "max_tokens"
    endless = stream(served.url, {"prompt": "a", "max_tokens": 1900, "ignore_eos": True})
    next(endless)
    until(served, num_requests_running=1)
    endless.close()
    until(served, num_requests_running=0)
    assert "amoe:generation_tokens_total" in httpx.get(f"{served.url}/metrics").text


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


def test_an_address_that_is_no_rays(at_a_strangers_address: Refused) -> None:
    assert f"Ray at {at_a_strangers_address.address} has not answered within 24 s" in at_a_strangers_address.words()

"""Workers as actors of a Ray cluster of two nodes on this host: exact, replaced when they die, and clear when it cannot
work. Attention workers are pinned to one node and expert workers to the other."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import yaml
from ray.cluster_utils import Cluster

from amoe.builtin import builtin_model_path
from amoe.cluster.cluster import WorkerCluster
from amoe.cluster.executor import ExecutorOptions
from amoe.cluster.front import Front, serving
from amoe.cluster.opening import open_cluster
from amoe.cluster.ray_cluster import session
from amoe.cluster.ray_cluster.actor import started_at
from amoe.cluster.ray_cluster.handle import RayWorker
from amoe.config import EngineConfig
from amoe.engine.tokenizer import Tokenizer
from amoe.errors import ConfigError
from tests.integration.exactness import Case, assert_exact, checkpoint
from tests.processes import generate

SERVE_YAML = Path(__file__).parents[2] / "deploy" / "ray" / "serve.yaml"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes; nothing of them is left afterwards."""
    directory = tempfile.mkdtemp(prefix="amoe-ray-")  # short: sockets' paths are
    roles = [{"amoe_attention": 1}, {"amoe_experts": 1}]
    head = {"num_cpus": 4, "resources": roles[0], "include_dashboard": False, "temp_dir": directory}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=4, resources=roles[1])
        yield cluster
    finally:
        cluster.shutdown()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray")


@contextlib.asynccontextmanager
async def running(cluster: Cluster, config: EngineConfig, **options) -> AsyncIterator[tuple[Front, WorkerCluster]]:
    """An engine on `cluster`, which is left afterwards."""
    executor = ExecutorOptions(name="ray", ray_address=cluster.address, ray_pin_roles=True, **options)
    workers = await open_cluster(config, executor)
    async with serving(workers, name="m", tokenizer=Tokenizer(config.model)) as front:
        yield front, workers
    assert not ray.is_initialized()


async def check(front: Front, case: Case, root: Path) -> None:
    results = await generate(front.engine, case.prompts, case.params)
    logprobs = [[entry.logprob for entry in result.logprobs] for result in results]
    assert_exact(case, root, [result.token_ids for result in results], logprobs)


def actor(workers: WorkerCluster, rank: int) -> RayWorker:
    worker = workers.workers[rank]
    assert isinstance(worker, RayWorker)
    return worker


def actor_names() -> set[str]:
    return {found["name"] for found in ray.util.list_named_actors(all_namespaces=True)}


async def until_serving(front: Front, rank: int, incarnation: int) -> None:
    """The worker serves in that life, or in a later one."""
    assert front.admin is not None
    while True:
        status = {worker.rank: worker for worker in front.admin.status().workers}.get(rank)
        if status is not None and status.state == "serving" and status.incarnation >= incarnation:
            return
        await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("case", "transport"),
    [
        (Case("progress", 1, "olmoe", "2A2E", "plain", 1), "distributed"),
        (Case("lockstep", 1, "qwen3_moe", "1A1E", "plain", 1), "tcp"),
    ],
    ids=str,
)
async def test_exact_on_two_nodes(cluster: Cluster, root: Path, case: Case, transport) -> None:
    config = replace(case.config(checkpoint(root, case.arch, case.variant)), transport=transport)
    async with running(cluster, config, deployment="exact") as (front, workers):
        await check(front, case, root)
        assert (
            len({actor(workers, 0).where.node_id, actor(workers, config.placement.num_workers - 1).where.node_id}) == 2
        )
        roles = ["attention"] * len(config.placement.attention_ranks) + ["experts"] * config.placement.expert_workers
        assert actor_names() == {f"amoe/exact/{role}-{rank}" for rank, role in enumerate(roles)}


async def test_workers_are_replaced_added_and_removed(cluster: Cluster, root: Path) -> None:
    """One is killed, one is stopped, another one comes and goes: what was asked meanwhile is exact."""
    case = Case("waves", 0, "mixtral", "1A1E", "plain", 2)
    config = replace(case.config(checkpoint(root, case.arch, case.variant)), transport="tcp")
    config = replace(config, placement=replace(config.placement, max_expert_workers=2))
    async with running(cluster, config) as (front, workers):
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
        assert "amoe/amoe/experts-2" not in actor_names()


async def test_too_little_room_is_told(cluster: Cluster, root: Path) -> None:
    case = Case("waves", 0, "mixtral", "1A1E", "plain", 2)
    config = replace(case.config(checkpoint(root, case.arch, case.variant)), transport="tcp", threads_per_worker=64)
    with pytest.raises(ConfigError) as error:
        async with running(cluster, config, ray_placement_timeout_s=0.5):
            pass
    for words in ("worker(s) of 64 CPU", "2 node(s)", "4 CPU", "fewer --threads-per-worker"):
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

"""Ray's head node is lost, with the GCS, whose tables Redis keeps, and another one comes: what is served goes on."""

from __future__ import annotations

import asyncio
import functools
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from amoe.cluster.front import Front
from amoe.cluster.ray_cluster.handle import RayWorker
from amoe.cluster.ray_cluster.listeners import PatientErrorSubscriber, PatientLogSubscriber
from amoe.types import SamplingParams
from tests.integration.exactness import Case, checkpoint
from tests.processes import generate
from tests.ray_nodes import CPUS_PER_NODE, HEAD_TAKES, OTHER_TAKES, head_node, running, start_head

REDIS = shutil.which("redis-server")
NUM_TOKENS = 120
PROMPT = [5, 6, 7]
HEAD, APART = "127.0.0.2", "127.0.0.3"

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(REDIS is None, reason="no redis-server here: apt-get install redis-server"),
]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.fixture
def redis_address(tmp_path: Path) -> Iterator[str]:
    port = free_port()
    command = [str(REDIS), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def cluster(redis_address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head that takes no workers, and a node of the server and its workers: Ray tells them apart by their addresses,
    and would have the server join the head."""
    monkeypatch.setenv("RAY_REDIS_ADDRESS", redis_address)
    monkeypatch.setattr(ray, "init", functools.partial(ray.init, _node_ip_address=APART))
    with head_node(HEAD, num_cpus=0) as cluster:
        cluster.add_node(num_cpus=CPUS_PER_NODE, resources=HEAD_TAKES | OTHER_TAKES, node_ip_address=APART)
        yield cluster


class Streams:
    """One after the other, until `stop`."""

    def __init__(self, front: Front) -> None:
        self.outputs: list[list[int]] = []
        self._front = front
        self._is_stopped = False
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
        while not self._is_stopped:
            (result,) = await generate(self._front.engine, [PROMPT], params)
            self.outputs.append(result.token_ids)

    async def more(self, count: int) -> None:
        """Until so many have ended that had not begun."""
        enough = len(self.outputs) + 1 + count
        while len(self.outputs) < enough and not self._task.done():  # noqa: ASYNC110 - the task says nothing
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        self._is_stopped = True
        await self._task


async def test_streams_go_on_and_workers_are_replaced(cluster: Cluster, tmp_path: Path) -> None:
    """While there is no head, nobody notices; once there is one again, a worker that is killed is replaced."""
    case = Case("waves", 0, "qwen3_moe", "1A1E", "plain", 0)
    config = case.config(checkpoint(tmp_path, case.arch, case.variant))
    config = replace(config, transport="tcp", max_model_len=NUM_TOKENS + len(PROMPT))
    port, directory = int(cluster.address.rpartition(":")[2]), cluster.head_node.temp_dir
    async with running(cluster.address, config) as (front, workers):
        driver = ray._private.worker.global_worker
        assert isinstance(driver.gcs_log_subscriber, PatientLogSubscriber), "it would starve the server otherwise"
        assert isinstance(driver.gcs_error_subscriber, PatientErrorSubscriber)
        streams = Streams(front)
        await streams.more(1)
        await asyncio.to_thread(cluster.remove_node, cluster.head_node, False)
        await streams.more(2)
        start_head(cluster, HEAD, num_cpus=0, gcs_server_port=port, temp_dir=directory)  # Ray wants the main thread
        await streams.more(1)
        worker = workers.workers[1]
        assert isinstance(worker, RayWorker)
        os.kill(worker.where.pid, signal.SIGKILL)
        await streams.more(1)
        await streams.stop()
        assert all(output == streams.outputs[0] for output in streams.outputs)
        assert front.admin is not None
        assert [worker.incarnation for worker in front.admin.status().workers] == [0, 1]

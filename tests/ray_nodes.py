"""A Ray cluster of two nodes, and engines on it: attention workers go to the head, and expert workers to the other."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from amoe.cluster.cluster import WorkerCluster
from amoe.cluster.executor import ExecutorOptions
from amoe.cluster.front import Front, serving
from amoe.cluster.opening import open_cluster
from amoe.config import EngineConfig
from amoe.engine.tokenizer import Tokenizer
from tests.integration.exactness import Case, assert_exact
from tests.processes import generate

CPUS_PER_NODE = 4
# What each role's workers ask for where roles are pinned to nodes.
HEAD_TAKES = {"amoe_attention": 1, "amoe_colocated": 1}
OTHER_TAKES = {"amoe_experts": 1, "amoe_colocated": 1}
# Ray would start a process for each processor of each node as soon as somebody connects, and workers take none of them.
_NO_SPARES = {"prestart_worker_first_driver": False, "enable_worker_prestart": False}


@contextlib.contextmanager
def head_node(host: str | None = None, num_cpus: int = CPUS_PER_NODE) -> Iterator[Cluster]:
    """The head alone, at that address of this host, or at the one that Ray finds. Nothing of it is left afterwards."""
    directory = tempfile.mkdtemp(prefix="amoe-ray-")  # short: sockets' paths are
    cluster = Cluster()
    start_head(cluster, host, num_cpus=num_cpus, temp_dir=directory)
    try:
        yield cluster
    finally:
        cluster.shutdown()
        shutil.rmtree(directory, ignore_errors=True)


def start_head(cluster: Cluster, host: str | None, *, num_cpus: int, **options: Any) -> None:
    """Give a cluster its head, or another one. Call it in the main thread."""
    head = {"num_cpus": num_cpus, "resources": HEAD_TAKES, "include_dashboard": False, "_system_config": _NO_SPARES}
    if host is not None:
        head["node_ip_address"] = host
    cluster.add_node(**head, **options)


@contextlib.contextmanager
def two_nodes(num_cpus: int = CPUS_PER_NODE) -> Iterator[Cluster]:
    """Both on this host. Nothing of them is left afterwards."""
    with head_node(num_cpus=num_cpus) as cluster:
        cluster.add_node(num_cpus=num_cpus, resources=OTHER_TAKES)
        yield cluster


@contextlib.asynccontextmanager
async def running(
    address: str, config: EngineConfig, *, pinned: bool = True, **options
) -> AsyncIterator[tuple[Front, WorkerCluster]]:
    """An engine on the cluster at `address`, which is left afterwards."""
    executor = ExecutorOptions(name="ray", ray_address=address, ray_pin_roles=pinned, **options)
    workers = await open_cluster(config, executor)
    async with serving(workers, name="m", tokenizer=Tokenizer(config.model)) as front:
        yield front, workers


async def check(front: Front, case: Case, root: Path) -> None:
    """What it generates now is what transformers generates."""
    results = await generate(front.engine, case.prompts, case.params)
    logprobs = [[entry.logprob for entry in result.logprobs] for result in results]
    assert_exact(case, root, [result.token_ids for result in results], logprobs)

"""Greedy output equals transformers' on a Ray cluster of two nodes: schedules × placements × transports × kernels.

A few cells run always, all of them with `make test-all`. Starting the actors is what takes the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from amoe.cluster.ray_cluster.handle import RayWorker
from amoe.cluster.ray_cluster.session import NAMESPACE
from tests.integration.exactness import KERNELS, Case, checkpoint
from tests.integration.transport_cells import CELLS
from tests.ray_nodes import check, running, two_nodes

pytestmark = pytest.mark.cluster

CPUS_PER_NODE = 2
# Each placement, transport and kernels with each other; the schedules in turn.
ALWAYS = [
    (Case("waves", 0, "qwen2_moe", "colocated2", "plain", 1, 2, KERNELS[0]), "tcp"),
    (Case("defrag", 1, "mixtral", "colocated2", "preempted", 0, 0, KERNELS[-1]), "distributed"),
    (Case("lockstep", 2, "qwen3_moe", "1A1E", "plain", 1, 0, KERNELS[0]), "distributed"),
    (Case("mtfs", 1, "olmoe", "1A1E", "cached", 2, 0, KERNELS[-1]), "tcp"),
    (Case("progress", 1, "olmoe", "2A2E", "plain", 1, 0, KERNELS[-1]), "distributed"),
    (Case("flfs", 1, "qwen3_moe", "2A2E", "cached+preempted", 0, 2, KERNELS[0]), "tcp"),
]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of the cluster, to which this process stays connected: that takes a second each time."""
    with two_nodes(CPUS_PER_NODE) as cluster:
        ray.init(cluster.address, namespace=NAMESPACE, logging_level="warning")
        try:
            yield cluster.address
        finally:
            ray.shutdown()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray")


async def run_actors(case: Case, transport: str, address: str, root: Path) -> None:
    config = replace(case.config(checkpoint(root, case.arch, case.variant)), transport=transport)
    if config.placement.colocated:  # which would share a node, if there were room
        config = replace(config, threads_per_worker=CPUS_PER_NODE)
    async with running(address, config, deployment="exact") as (front, workers):
        for _ in range(2 if "cached" in case.feature else 1):
            await check(front, case, root)
        found = [worker for worker in workers.workers.values() if isinstance(worker, RayWorker)]
        assert len({worker.where.pid for worker in found}) == config.placement.num_workers
        assert len({worker.where.node_id for worker in found}) == 2


@pytest.mark.parametrize(("case", "transport"), ALWAYS, ids=str)
async def test_on_two_nodes(case: Case, transport: str, address: str, root: Path) -> None:
    await run_actors(case, transport, address, root)


@pytest.mark.matrix
@pytest.mark.parametrize(("case", "transport"), CELLS, ids=str)
async def test_matrix_on_two_nodes(case: Case, transport: str, address: str, root: Path) -> None:
    await run_actors(case, transport, address, root)

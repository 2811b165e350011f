"""Greedy output equals transformers' over transports between hosts: schedules × placements × transports × kernels.

The workers share this process and talk through sockets; a few cells run again with worker processes. `make test-all`
has more of both, with the architectures and features of `test_token_exact.py`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from amoe.cluster.front import running_engine
from tests.integration.exactness import FACTORS, Case, assert_exact, checkpoint, make_cases
from tests.integration.transport_cells import BETWEEN, CELLS, TRANSPORTS
from tests.pairwise import pairwise
from tests.processes import generate
from tests.wired import WiredCluster

MATRIX = make_cases(pairwise({**FACTORS, "placement": BETWEEN}))
PROCESSES = [
    (Case("waves", 0, "qwen3_moe", "2A2E", "cached+preempted", 0, 2), "tcp"),
    (Case("progress", 1, "olmoe", "colocated2", "plain", 1), "distributed"),
]


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wired")


def run_wired(case: Case, transport: str, root: Path) -> None:
    config = replace(case.config(checkpoint(root, case.arch, case.variant)), transport=transport)
    cluster = WiredCluster(config)
    try:
        for _ in range(2 if "cached" in case.feature else 1):
            results = cluster.generate(case.prompts, case.params)
            logprobs = [[entry.logprob for entry in result.logprobs] for result in results]
            assert_exact(case, root, [result.token_ids for result in results], logprobs)
    finally:
        cluster.close()


async def run_processes(case: Case, transport: str, root: Path) -> None:
    config = replace(case.config(checkpoint(root, case.arch, case.variant)), transport=transport)
    async with running_engine(config) as (engine, _):
        results = await generate(engine, case.prompts, case.params)
        logprobs = [[entry.logprob for entry in result.logprobs] for result in results]
        assert_exact(case, root, [result.token_ids for result in results], logprobs)


@pytest.mark.parametrize(("case", "transport"), CELLS, ids=str)
def test_every_schedule_and_placement(case: Case, transport: str, root: Path) -> None:
    run_wired(case, transport, root)


@pytest.mark.parametrize(("case", "transport"), PROCESSES, ids=str)
async def test_worker_processes(case: Case, transport: str, root: Path) -> None:
    await run_processes(case, transport, root)


@pytest.mark.matrix
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_matrix(case: Case, transport: str, root: Path) -> None:
    run_wired(case, transport, root)


@pytest.mark.matrix
@pytest.mark.parametrize(("case", "transport"), CELLS, ids=str)
async def test_matrix_of_processes(case: Case, transport: str, root: Path) -> None:
    await run_processes(case, transport, root)

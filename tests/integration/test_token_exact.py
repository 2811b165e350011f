"""Greedy output equals transformers', token for token: architectures × schedules × placements × cache pressure.

Workers are real but share this process (see `tests/cluster.py`); `test_processes.py` does it with processes.
`make test` runs a covering selection, `make test-all` the whole matrix.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from amoe.kernels import native
from amoe.transport.base import Transport
from amoe.transport.faulty import FaultPlan, FaultyTransport
from tests.cluster import Finished, InprocCluster
from tests.integration.exactness import FACTORS, FORWARD, Case, assert_exact, checkpoint, make_cases, whole_matrix
from tests.pairwise import pairwise

SELECTION = make_cases([*pairwise(FACTORS), *pairwise(FORWARD)])
MATRIX = whole_matrix()


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exact")


def check(case: Case, root: Path, results: list[Finished]) -> None:
    logprobs = [[entry.logprob for entry in result.logprobs] for result in results]
    assert_exact(case, root, [result.token_ids for result in results], logprobs)
    assert {result.finish_reason for result in results} == {"length"}


def run_case(case: Case, root: Path) -> None:
    cluster = InprocCluster(case.config(checkpoint(root, case.arch, case.variant)))
    check(case, root, cluster.generate(case.prompts, case.params))
    if "cached" in case.feature:
        again = cluster.generate(case.prompts, case.params)
        check(case, root, again)
        if case.feature == "cached":
            assert sum(result.num_cached_tokens for result in again) > 0
    batchers = [worker.core.batcher for worker in cluster.workers if worker.core.batcher]
    if "preempted" in case.feature:
        assert sum(batcher.num_preemptions for batcher in batchers) > 0
    if case.replicas:
        assert cluster.num_steers > 0
    cluster.assert_nothing_left()
    cluster.close()


@pytest.mark.parametrize("case", SELECTION, ids=str)
def test_selection(case: Case, root: Path) -> None:
    run_case(case, root)


@pytest.mark.matrix
@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_matrix(case: Case, root: Path) -> None:
    run_case(case, root)


@pytest.mark.skipif(not native.is_available(), reason="the native kernels are not built")
@pytest.mark.parametrize("schedule", ["forward", "waves"])
@pytest.mark.parametrize("isa", native.instruction_sets())
def test_every_instruction_set_of_the_processor(
    isa: str, schedule: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(native.ISA_VARIABLE, isa)
    placement = "1" if schedule == "forward" else "colocated2"
    run_case(Case(schedule, 1, "qwen3_moe", placement, "cached", 0, kernels="native"), root)


@pytest.mark.parametrize("keep_order", [True, False], ids=["ordered", "unordered"])
@pytest.mark.parametrize("schedule", [("progress", 1), ("defrag", 1), ("waves", 2), ("lockstep", 2)], ids=str)
def test_late_and_repeated_batches_change_nothing(schedule: tuple[str, int], keep_order: bool, root: Path) -> None:
    case = Case(*schedule, "qwen2_moe", "2A2E", "plain", 1)
    plan = FaultPlan(seed=7, delay=0.3, max_delay_polls=20, duplicate=0.4, keep_order=keep_order)

    def wrap(transport: Transport) -> Transport:
        return FaultyTransport(transport, plan)

    cluster = InprocCluster(case.config(checkpoint(root, case.arch, case.variant)), wrap=wrap)
    check(case, root, cluster.generate(case.prompts, case.params))
    cluster.assert_nothing_left()
    cluster.close()

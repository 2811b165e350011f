"""The imbalance of experts is that of the last heartbeats, not of all time."""

from __future__ import annotations

import numpy as np
import pytest

from amoe.metrics import ExpertLoad
from amoe.metrics.experts import NUM_SAMPLES, SAMPLE_EVERY, imbalance
from amoe.stats import WorkerStats


def beat(load: ExpertLoad, workers: dict[int, WorkerStats], count: int = SAMPLE_EVERY) -> None:
    for _ in range(count):
        for rank in workers:
            load.beat(rank, workers)


def workers(*pairs: list[list[int]]) -> dict[int, WorkerStats]:
    """Expert workers of ranks 1, 2, ...; 0 is an attention worker."""
    owners = {rank: WorkerStats(rank, "experts", expert_pairs=p) for rank, p in enumerate(pairs, start=1)}
    return {0: WorkerStats(0, "attention"), **owners}


def test_max_over_mean_of_each_row():
    np.testing.assert_allclose(imbalance(np.array([[1.0, 1, 1, 1], [4, 0, 0, 0], [0, 0, 0, 0]])), [1, 4, np.nan])


def test_experts_are_summed_over_workers_and_workers_over_experts():
    load = ExpertLoad()
    beat(load, workers([[6, 0], [0, 0]], [[1, 1], [2, 2]]))
    assert load.over_experts() == {0: pytest.approx(7 / 4), 1: 1.0}
    assert load.over_workers() == {0: pytest.approx(6 / 4), 1: 2.0}


def test_what_is_long_ago_does_not_count():
    load = ExpertLoad()
    beat(load, workers([[1000, 0]]))
    assert load.over_experts() == {0: 2.0}
    for step in range(1, NUM_SAMPLES + 1):
        beat(load, workers([[1000 + step, step]]))
    assert load.over_experts() == {0: 1.0}


def test_a_window_without_work_has_no_imbalance():
    load = ExpertLoad()
    for _ in range(3):
        beat(load, workers([[5, 0]]))
    assert load.over_experts() == {} == load.over_workers()


def test_no_expert_worker_is_no_imbalance():
    load = ExpertLoad()
    beat(load, workers())
    assert load.over_experts() == {}


def test_a_worker_that_starts_anew_does_not_count_below_zero():
    load = ExpertLoad()
    beat(load, workers([[500, 500]]))
    beat(load, workers([[3, 600]]))
    assert load.over_experts() == {0: 2.0}

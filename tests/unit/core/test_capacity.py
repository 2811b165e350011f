"""Capacity in whole virtual clusters: exact requests get the oracle's tokens, whatever is taken from the others."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoe.config import CapacityConfig, PlacementConfig, SchedulerConfig
from amoe.core.sequence import UsageColumn
from tests.unit.core.examples import clusters
from tests.unit.core.fake_model import ModelSpec
from tests.unit.core.harness import Cluster, run_scenario
from tests.unit.core.scenario import Request, Scenario
from tests.unit.core.scenarios import SCHEDULES, scenarios
from tests.unit.core.virtual_worker import VirtualWorker


@st.composite
def capacities(draw):
    if draw(st.booleans()):
        return CapacityConfig(
            slack_s=draw(st.sampled_from([1e-3, 0.0, 10.0])),
            telemetry_s=draw(st.sampled_from([1e9, 1e-3])),
            mode=draw(st.sampled_from(["drop", "reroute"])),
            phase=draw(st.sampled_from(["both", "prefill", "decode"])),
            keep_best=draw(st.booleans()),
        )
    mode = draw(st.sampled_from(["drop", "reroute", "expanded"]))
    return CapacityConfig(
        factor=draw(st.sampled_from([0.5, 1.0, 0.01, 1.5])),
        mode=mode,
        metric=draw(st.sampled_from(["score", "order", "reverse", "random"])) if mode == "drop" else "score",
        scope=draw(st.sampled_from(["expert", "device"])),
        phase=draw(st.sampled_from(["both", "prefill", "decode"])),
        keep_best=draw(st.booleans()),
        exceed_top_k=mode == "expanded" and draw(st.booleans()),
    )


@st.composite
def capacity_scenarios(draw, **limits):
    """Some requests exact, the others not."""
    scenario = draw(scenarios(**limits))
    exact = draw(st.lists(st.booleans(), min_size=len(scenario.requests), max_size=len(scenario.requests)))
    requests = tuple(replace(request, exact=flag) for request, flag in zip(scenario.requests, exact, strict=True))
    return replace(scenario, requests=requests, capacity=draw(capacities()))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: f"{schedule[0]}{schedule[1]}")
@clusters(4)
@given(data=st.data())
def test_every_schedule(schedule, data):
    run_scenario(data.draw(capacity_scenarios(schedules=[schedule], max_requests=6, max_prompt=30)))


@clusters(30)
@given(capacity_scenarios(aborts=True, duplicates=0.3))
def test_aborts_duplicates_and_little_memory(scenario):
    run_scenario(scenario)


@clusters(20)
@given(capacity_scenarios(replicas=True))
def test_replicas_and_changing_shares(scenario):
    run_scenario(scenario)


@pytest.mark.parametrize("mode", ["drop", "reroute"])
def test_slow_workers_are_relieved(mode):
    """Three workers, of which the second takes ten times as long as the others."""
    requests = tuple(Request(i, i % 3, tuple(range(1 + i % 7, 9 + i % 7)), 12, exact=False) for i in range(24))
    scenario = Scenario(
        requests=requests,
        spec=ModelSpec((True, True, True), 2, (0,) * 6, vocab=64),
        placement=PlacementConfig(colocated=3),
        scheduler=SchedulerConfig(schedule="progress", max_num_seqs=8, max_num_batched_tokens=64),
        capacity=CapacityConfig(slack_s=1e-3, telemetry_s=10.0, mode=mode, phase="both"),
    )
    cluster = run_scenario(scenario)
    lost = sum(home.core.attention.capacity.ledger.lost for home in cluster.homes)  # [L, E, 2]
    assert lost[..., 1 if mode == "reroute" else 0].sum() > 0
    assert lost[:, 2:4].sum() > lost.sum() / 3  # the experts of the second worker, a third of all


@clusters(20)
@given(capacity_scenarios(roomy=True))
def test_what_is_told_is_what_has_happened(scenario):
    """Pairs computed = pairs wanted - pairs dropped, by the ledger, by the sequences' usage, and by what was sent."""
    cluster = Cluster(scenario)
    sent = Counter()
    for worker in cluster.workers:
        _count_pairs(worker, sent)
    cluster.run()
    cluster.check_end()
    total = sum((home.seen_usage for home in cluster.homes), np.zeros(len(UsageColumn)))
    lost = sum(home.core.attention.capacity.ledger.lost.sum(axis=(0, 1)) for home in cluster.homes)
    assert total[UsageColumn.DROPPED] == lost[0]
    assert total[UsageColumn.REROUTED] == lost[1]
    if not scenario.capacity.exceed_top_k:
        assert sent["pairs"] == total[UsageColumn.PAIRS] - total[UsageColumn.DROPPED]
    assert 0 <= total[UsageColumn.MASS_LOST] <= total[UsageColumn.TOKENS]
    if all(request.exact for request in scenario.requests):
        assert lost.sum() == 0


def _count_pairs(worker: VirtualWorker, sent: Counter) -> None:
    if worker.core.attention is None:
        worker.seen_usage = np.zeros(len(UsageColumn))
        return
    on_attention, leave = worker.core.attention.on_attention, worker.batcher.table.leave
    worker.seen_usage = np.zeros(len(UsageColumn))

    def counted(*args, **named):
        outgoing = on_attention(*args, **named)
        sent["pairs"] += sum(int((item.batch.expert_ids >= 0).sum()) for item in outgoing)
        return outgoing

    def left(sequence):
        tokens = leave(sequence)
        worker.seen_usage += sequence.usage
        return tokens

    worker.core.attention.on_attention = counted
    worker.batcher.table.leave = left

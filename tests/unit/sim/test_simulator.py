"""The simulator against sums done by hand, and what must hold whatever is simulated."""

from __future__ import annotations

import numpy as np
import pytest

from amoe.config import BLOCK_SCHEDULES, CacheConfig, PlacementConfig, SchedulerConfig
from amoe.profiles.costs import RooflineCosts
from amoe.profiles.links import LinkProfile
from amoe.profiles.routing import log_normal_routing
from amoe.sim.config import HostModel, Outage, Slowdown, Window
from amoe.sim.links import HEADER_BYTES
from amoe.sim.simulator import Simulator
from amoe.sim.workload import Lengths, Workload
from tests.unit.sim.cases import DEVICE, FABRIC, SIZES, FixedCosts, FixedRouting, make_config, simulate

PROMPT, OUTPUT = 20, 10
ONE = Workload(concurrency=1, num_requests=1, input=Lengths(mean=PROMPT), output=Lengths(mean=OUTPUT))
PLACEMENTS = {
    "1": PlacementConfig(),
    "colocated3": PlacementConfig(colocated=3),
    "1A1E": PlacementConfig(expert_workers=1),
    "2A3E": PlacementConfig(attention_workers=2, expert_workers=3),
}
SCHEDULE_CASES = [(name, 1) for name in BLOCK_SCHEDULES] + [("lockstep", 2), ("lockstep", 3)]


def link_seconds(link: LinkProfile, num_bytes: float) -> float:
    return 2 * num_bytes / link.bandwidth + link.latency_s


def dispatch_bytes(num_rows: int) -> float:
    return HEADER_BYTES + num_rows * (3 * 4 + SIZES.top_k * 6 + SIZES.row_bytes)


def result_bytes(num_rows: int) -> float:
    return HEADER_BYTES + num_rows * (2 * 4 + SIZES.row_bytes)


def analytic_gaps(per_layer: float = 0.0, per_step: float = 0.0) -> list[float]:
    """Times between the tokens of a sequence that is alone, its experts together on one worker."""
    costs = RooflineCosts(SIZES, DEVICE)
    counts = np.bincount([1, 2], minlength=SIZES.num_experts)
    num_steps = SIZES.num_layers + SIZES.num_sparse_layers + 1
    gaps = []
    for context in range(PROMPT + 1, PROMPT + OUTPUT):
        gap = costs.head(1) + num_steps * per_step
        for layer, is_sparse in enumerate(SIZES.sparse_layers):
            gap += costs.attention(layer, 1, context)
            gap += float(costs.experts(layer, counts)) + per_layer if is_sparse else 0.0
        gaps.append(gap)
    return gaps


def assert_gaps(results, gaps: list[float]) -> None:
    latency = results.inter_token_latency
    assert latency.count == len(gaps)
    assert latency.mean == pytest.approx(np.mean(gaps), rel=1e-9)
    assert latency.max == pytest.approx(max(gaps), rel=1e-9)
    assert latency.p50 == pytest.approx(np.median(gaps), rel=1e-9)


@pytest.mark.parametrize("schedule", BLOCK_SCHEDULES)
@pytest.mark.parametrize("host_s", [0.0, 3e-4])
def test_one_sequence_alone_takes_the_sum_of_its_stages(schedule, host_s):
    results = simulate(
        workload=ONE,
        routing=FixedRouting(1, 2),
        scheduler=SchedulerConfig(schedule=schedule, max_num_seqs=4),
        host=HostModel(seconds=host_s),
    )
    assert_gaps(results, analytic_gaps(per_step=host_s))


@pytest.mark.parametrize("schedule", [name for name in BLOCK_SCHEDULES if name not in ("lockstep", "waves")])
def test_between_two_workers_links_are_added(schedule):
    results = simulate(
        workload=ONE,
        routing=FixedRouting(1, 2),
        placement=PlacementConfig(expert_workers=1),
        scheduler=SchedulerConfig(schedule=schedule, max_num_seqs=4),
    )
    links = link_seconds(FABRIC.intra, dispatch_bytes(1)) + link_seconds(FABRIC.intra, result_bytes(1))
    assert_gaps(results, analytic_gaps(per_layer=links))


def test_a_queued_host_is_not_seen_where_it_fits():
    serial, queued = (
        simulate(workload=ONE, routing=FixedRouting(1, 2), host=host)
        for host in (HostModel(), HostModel(seconds=1e-6, mode="queued"))
    )
    assert queued.inter_token_latency == serial.inter_token_latency


def test_lockstep_is_the_sum_of_its_barriers():
    """Two workers with four sequences each. Half of the tokens of each go to the experts of the other."""
    results = Simulator(
        make_config(
            workload=Workload(concurrency=8, num_requests=8, input=Lengths(mean=1), output=Lengths(mean=OUTPUT)),
            placement=PlacementConfig(colocated=2),
            scheduler=SchedulerConfig(schedule="lockstep", max_num_seqs=4),
        ),
        FixedCosts,
    ).run()
    attention = FixedCosts.ATTENTION + 4 * FixedCosts.TOKEN
    experts = FixedCosts.EXPERTS + 8 * FixedCosts.TOKEN  # 2 + 2 tokens, 2 pairs each
    head = FixedCosts.HEAD + 4 * FixedCosts.TOKEN
    announcing = link_seconds(FABRIC.intra, HEADER_BYTES)
    exchange = link_seconds(FABRIC.intra, dispatch_bytes(2)) + link_seconds(FABRIC.intra, result_bytes(2))
    iteration = announcing + SIZES.num_layers * attention + SIZES.num_sparse_layers * (experts + exchange) + head
    latency = results.inter_token_latency
    assert latency.count == 8 * (OUTPUT - 1)
    assert latency.p50 == pytest.approx(iteration, rel=1e-9)
    assert latency.max == pytest.approx(iteration, rel=1e-9)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("schedule", "micro_batches"), SCHEDULE_CASES)
def test_every_token_asked_for_comes_and_nothing_is_left(placement, schedule, micro_batches):
    simulator = Simulator(
        make_config(
            routing=log_normal_routing(SIZES, 1.0, seed=1),
            workload=Workload(concurrency=7, num_requests=20, input=Lengths(mean=30), output=Lengths(mean=6)),
            placement=PLACEMENTS[placement],
            scheduler=SchedulerConfig(
                schedule=schedule, micro_batches=micro_batches, max_num_seqs=5, max_num_batched_tokens=16
            ),
        )
    )
    results = simulator.run()
    assert (results.requests_finished, results.requests_open, results.output_tokens) == (20, 0, 120)
    assert results.time_to_first_token.count == 20
    assert results.inter_token_latency.count == 100
    assert_nothing_left(simulator)


def assert_nothing_left(simulator: Simulator) -> None:
    for core in simulator.cores:
        assert not core.queues.depth.any()
        if core.attention is not None:
            batcher = core.attention.batcher
            batcher.blocks.check()
            assert batcher.blocks.num_used == 0
            assert batcher.slots.num_free == batcher.slots.num_slots
            assert not batcher.waiting


@pytest.mark.parametrize("schedule", ["progress", "lockstep"])
def test_where_kv_blocks_run_out_sequences_are_preempted_and_still_end(schedule):
    results = simulate(
        workload=Workload(concurrency=8, num_requests=24, input=Lengths(mean=8), output=Lengths(mean=40)),
        cache=CacheConfig(block_size=4, num_blocks=30, enable_prefix_caching=False),
        placement=PlacementConfig(colocated=2),
        scheduler=SchedulerConfig(schedule=schedule, max_num_seqs=8),
    )
    assert all(worker.num_preemptions > 0 for worker in results.workers)
    assert (results.requests_finished, results.output_tokens) == (24, 24 * 40)


def test_the_same_seed_gives_the_same_run():
    changes = {
        "routing": log_normal_routing(SIZES, 1.0, seed=1),
        "workload": Workload(
            request_rate=200.0,
            num_requests=40,
            input=Lengths(mean=30, kind="lognormal", spread=0.5),
            output=Lengths(mean=10, kind="uniform", spread=0.5),
        ),
        "placement": PLACEMENTS["2A3E"],
    }
    first, second, other = (simulate(seed=seed, **changes) for seed in (5, 5, 6))
    assert first == second
    assert first != other
    assert first.requests_finished == 40


def test_everything_on_a_slow_device_takes_longer():
    config = make_config(workload=ONE, slowdowns=(Slowdown(rank=0, factor=2.0),))
    slow, normal = Simulator(config, FixedCosts).run(), Simulator(make_config(workload=ONE), FixedCosts).run()
    assert slow.inter_token_latency.mean == pytest.approx(2 * normal.inter_token_latency.mean, rel=1e-9)
    assert slow.workers[0].busy_fraction == pytest.approx(1.0)


def test_a_worker_that_stops_for_a_while_goes_on_after_it():
    workload = Workload(concurrency=6, num_requests=12, input=Lengths(mean=PROMPT), output=Lengths(mean=OUTPUT))
    changes = {"workload": workload, "placement": PlacementConfig(colocated=3)}
    outage = Outage(rank=1, start_s=0.003, end_s=0.403)
    stopped, normal = simulate(outages=(outage,), **changes), simulate(**changes)
    assert stopped.output_tokens == normal.output_tokens == 120
    assert 0.4 <= stopped.inter_token_latency.max <= 0.4 + 2 * normal.inter_token_latency.max
    assert stopped.window_s == pytest.approx(normal.window_s + 0.4, rel=0.1)


def test_a_worker_that_dies_takes_its_sequences_along():
    workload = Workload(concurrency=6, input=Lengths(mean=PROMPT), output=Lengths(mean=OUTPUT))
    results = simulate(
        workload=workload,
        window=Window(length=2.0),
        placement=PlacementConfig(attention_workers=2, expert_workers=1),
        outages=(Outage(rank=1, start_s=0.05),),
    )
    assert results.requests_open == 6
    assert results.workers[1].busy_fraction < 0.05
    assert results.workers[0].busy_fraction > 0.1
    assert results.timeline[-1].tokens_per_s > 0


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("schedule", BLOCK_SCHEDULES)
def test_whoever_dies_the_simulation_ends(schedule, rank):
    simulate(
        workload=Workload(concurrency=6, input=Lengths(mean=PROMPT), output=Lengths(mean=OUTPUT)),
        window=Window(length=500, unit="iterations"),
        placement=PlacementConfig(colocated=3),
        scheduler=SchedulerConfig(schedule=schedule, max_num_seqs=8, max_hold_s=0.02),
        outages=(Outage(rank=rank, start_s=0.02),),
    )


def test_iterations_are_whole_ones():
    config = make_config(
        workload=Workload(concurrency=8, input=Lengths(mean=1), output=Lengths(mean=1000)),
        window=Window(length=5, warmup=3, unit="iterations"),
        placement=PlacementConfig(colocated=2),
        scheduler=SchedulerConfig(schedule="lockstep", max_num_seqs=4),
    )
    results = Simulator(config, FixedCosts).run()
    assert results.output_tokens == 5 * 8
    assert results.window_s == pytest.approx(5 * results.inter_token_latency.p50, rel=1e-9)


def test_progress_is_told_and_ends_below_one():
    config = make_config(workload=Workload(concurrency=8, output=Lengths(mean=20)), window=Window(length=2.0))
    seen: list[float] = []
    Simulator(config).run(seen.append)
    assert seen == sorted(seen)
    assert 0.0 < seen[0] < seen[-1] <= 1.0

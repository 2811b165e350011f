"""What capacity is worth in simulated time: deterministic, so that it can be asserted."""

from __future__ import annotations

import pytest

from amoe.config import CapacityConfig, PlacementConfig, SchedulerConfig
from amoe.profiles.routing import log_normal_routing
from amoe.sim.config import Slowdown, Window
from amoe.sim.simulator import Simulator
from amoe.sim.workload import Lengths, Workload
from tests.unit.sim.cases import SIZES, make_config


def measure(capacity: CapacityConfig, *, sigma: float, slow: float, schedule: str = "waves") -> tuple[float, float]:
    """(tokens per second, share of pairs lost) of four devices, one of which may be slower."""
    waves = 2 if schedule == "waves" else None
    config = make_config(
        routing=log_normal_routing(SIZES, sigma, seed=2),
        workload=Workload(concurrency=256, input=Lengths(mean=1), output=Lengths(mean=400)),
        placement=PlacementConfig(colocated=4),
        scheduler=SchedulerConfig(schedule=schedule, max_num_seqs=64, num_waves=waves),
        slowdowns=(Slowdown(rank=2, factor=slow),) if slow > 1 else (),
        window=Window(length=8, warmup=3, unit="iterations"),
        capacity=capacity,
    )
    simulator = Simulator(config)
    results = simulator.run()
    ledgers = [core.attention.capacity.ledger for core in simulator.cores if core.attention.capacity is not None]
    pairs = sum(ledger.tokens for ledger in ledgers) * SIZES.top_k
    return results.tokens_per_s, float(sum(ledger.lost.sum() for ledger in ledgers)) / max(1, pairs)


BACKLOG = CapacityConfig(slack_s=0.0, phase="both")
BATCH = CapacityConfig(factor=1.0, phase="both")


@pytest.mark.parametrize("schedule", ["waves", "lockstep"])
def test_capacity_relieves_hot_experts(schedule):
    lossless, _ = measure(CapacityConfig(), sigma=1.25, slow=1.0, schedule=schedule)
    for capacity in (BATCH, BACKLOG):
        speed, lost = measure(capacity, sigma=1.25, slow=1.0, schedule=schedule)
        assert speed > 1.05 * lossless
        assert 0 < lost < 0.3


def test_only_backlog_sees_a_slow_device():
    """Routing is even: by counting pairs nobody is over the capacity, but for noise."""
    lossless, _ = measure(CapacityConfig(), sigma=0.0, slow=2.0)
    by_count, lost_by_count = measure(BATCH, sigma=0.0, slow=2.0)
    by_backlog, lost_by_backlog = measure(BACKLOG, sigma=0.0, slow=2.0)
    assert by_backlog > 1.1 * lossless > by_count > lossless
    assert (by_backlog / lossless - 1) / lost_by_backlog > 1.5 * (by_count / lossless - 1) / lost_by_count


def test_a_patient_slack_takes_nothing():
    lossless, _ = measure(CapacityConfig(), sigma=1.25, slow=1.0)
    speed, lost = measure(CapacityConfig(slack_s=1.0, phase="both"), sigma=1.25, slow=1.0)
    assert lost == 0
    assert speed == pytest.approx(lossless, rel=0.03)  # other random numbers

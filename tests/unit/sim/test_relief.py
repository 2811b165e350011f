"""Homes that relieve late workers against the same shares alone, on the real cores: never worse, and better where a
worker is not as fast as whoever planned the shares believed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from amoe.config import PlacementConfig, SchedulerConfig, SteeringConfig
from amoe.profiles.routing import log_normal_routing
from amoe.sim.config import Slowdown, Window
from amoe.sim.replicas import with_replicas
from amoe.sim.simulator import Simulator
from amoe.sim.workload import Lengths, Workload
from tests.unit.sim.cases import SIZES, make_config

RIDGE_TOKENS = 20  # about the toy device's
NOISE = 0.03  # batches meet in another order as soon as anything takes another time


def tokens_per_s(
    num_homes: int, schedule: str, slowdown: Slowdown | None, *, relieves: bool, length: int = 12
) -> float:
    """All experts at each of three workers; the shares are planned for workers of one speed."""
    config = make_config(
        routing=log_normal_routing(SIZES, 0.5, 0),
        workload=Workload(concurrency=48, input=Lengths(mean=4), output=Lengths(mean=24, kind="uniform", spread=0.5)),
        window=Window(warmup=3, length=length, unit="iterations"),
        placement=PlacementConfig(attention_workers=num_homes, expert_workers=3),
        scheduler=SchedulerConfig(schedule=schedule, max_num_seqs=48, max_num_batched_tokens=256),
    )
    config = with_replicas(config, SIZES.num_experts, np.ones((SIZES.num_layers, SIZES.num_experts)), "planned")
    steering = SteeringConfig(interval_s=2.0 if relieves else 0.0, ridge_tokens=RIDGE_TOKENS)
    slowdowns = () if slowdown is None else (slowdown,)
    return Simulator(replace(config, slowdowns=slowdowns, steering=steering)).run().tokens_per_s


@pytest.mark.parametrize("schedule", ["waves", "progress", "lockstep"])
@pytest.mark.parametrize("num_homes", [1, 3])
def test_equal_workers_lose_nothing(num_homes, schedule):
    alone, relieved = (tokens_per_s(num_homes, schedule, None, relieves=relieves) for relieves in (False, True))
    assert relieved >= (1 - NOISE) * alone


@pytest.mark.parametrize("schedule", ["waves", "progress", "lockstep"])
@pytest.mark.parametrize("num_homes", [1, 3])
def test_a_worker_that_is_slower_than_planned_holds_nobody_up(num_homes, schedule):
    slow = Slowdown(rank=num_homes + 1, factor=4.0)
    alone, relieved = (tokens_per_s(num_homes, schedule, slow, relieves=relieves) for relieves in (False, True))
    assert relieved > 1.2 * alone


def test_it_is_followed_when_it_slows_down_in_the_middle():
    slow = Slowdown(rank=2, factor=4.0, at_s=0.006)
    alone, relieved = (tokens_per_s(1, "waves", slow, relieves=relieves, length=40) for relieves in (False, True))
    assert relieved > 1.1 * alone

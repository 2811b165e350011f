"""A worker without requests costs four turns a second, whatever it has served before."""

from __future__ import annotations

import select
from typing import cast

import pytest

from amoe.clock import ManualClock
from amoe.config import EngineConfig, PlacementConfig
from amoe.engine.messages import Heartbeat
from amoe.engine.worker import HEARTBEAT_S
from amoe.policy.patience import Patience
from amoe.types import SamplingParams
from tests.cluster import InprocCluster

IDLE_S = 60.0


class SleepingPoller:
    """Nothing ever comes: time passes until the timeout."""

    def __init__(self, clock: ManualClock) -> None:
        self._clock = clock

    def poll(self, timeout_ms: float) -> list[tuple[int, int]]:
        assert timeout_ms > 0, "a turn without work is followed by another at once"
        self._clock.advance(timeout_ms / 1000)
        return []


@pytest.mark.parametrize(
    "placement", [PlacementConfig(), PlacementConfig(colocated=2), PlacementConfig(expert_workers=1)]
)
def test_an_idle_worker_wakes_for_its_signs_of_life_alone(checkpoint_factory, placement: PlacementConfig):
    clock = ManualClock(0.0)
    config = EngineConfig(model=str(checkpoint_factory("olmoe")), placement=placement, threads_per_worker=1)
    cluster = InprocCluster(config, make_clock=lambda: clock)
    try:
        cluster.generate([[1, 2, 3], [4, 5]], SamplingParams(max_tokens=4, ignore_eos=True))
        cluster.settle()
        for worker, control in zip(cluster.workers, cluster.controls, strict=True):
            poller = cast(select.poll, SleepingPoller(clock))
            loops, began = worker.stats.loops, clock.now()
            while clock.now() < began + IDLE_S:
                assert not worker.turn()
                worker._sleep(poller)
            num_signs = IDLE_S / Patience(config.failure.timeout_s).sign_s
            assert worker.stats.loops - loops <= num_signs + 2
            assert len(control.outbox) <= num_signs + 2, "nor does it tell more than that it lives"
            heartbeats = [message for message in control.outbox if isinstance(message, Heartbeat)]
            assert IDLE_S / HEARTBEAT_S - 2 <= len(heartbeats) <= IDLE_S / HEARTBEAT_S + 2
    finally:
        cluster.close()

"""Every turn of a scheduler is counted with its reason."""

from __future__ import annotations

import numpy as np
import pytest

from amoe.config import EngineConfig, PlacementConfig, SchedulerConfig
from amoe.core.decisions import DecisionCounts
from amoe.core.steps import AttentionStep
from amoe.core.worker import ModelShape, WorkerCore
from amoe.policy.decision import Reason, reason_to_run
from amoe.stats import DecisionSnapshot
from amoe.types import BlockKind, SamplingParams


@pytest.mark.parametrize(
    ("num_ready", "is_open", "age_s", "reason"),
    [
        (1, True, 0.0, Reason.ONLY),
        (1, True, 9.0, Reason.ONLY),
        (3, True, 0.4, Reason.POLICY),
        (3, True, 0.6, Reason.OVERDUE),
        (3, False, 1.1, Reason.SLIP),
        (1, False, 1.1, Reason.SLIP),
        (2, True, float("-inf"), Reason.POLICY),  # a marker of lockstep: its queue is empty
    ],
)
def test_why_a_block_runs(num_ready: int, is_open: bool, age_s: float, reason: Reason):
    assert reason_to_run(num_ready, is_open=is_open, age_s=age_s, max_wait_s=0.5) is reason


def make_core(rank: int) -> WorkerCore:
    """Of two homes (0, 1) and an expert worker (2), in waves."""
    config = EngineConfig(
        model="fake",
        placement=PlacementConfig(attention_workers=2, expert_workers=1),
        scheduler=SchedulerConfig(schedule="waves", num_waves=1),
    )
    return WorkerCore(config, ModelShape([True, True], 4), rank, num_kv_blocks=8, max_model_len=64)


def test_a_worker_says_for_whom_it_waits():
    """A home whose tokens are at experts is not idle, and neither is an expert worker that holds some back."""
    home, experts = make_core(0), make_core(2)
    assert (home.next_step(0.0), experts.next_step(0.0)) == (None, None)
    assert home.reason_to_wait is experts.reason_to_wait is Reason.IDLE

    assert home.attention is not None
    home.attention.batcher.add(0, np.array([1, 2, 3], np.int32), SamplingParams(max_tokens=4))
    announced = home.start(0.0)
    step = home.next_step(0.0)
    assert isinstance(step, AttentionStep)
    pairs = np.zeros((3, 1), np.int64), np.ones((3, 1), np.float32)
    dispatched = home.attention.on_attention(step, *pairs, 0.0)
    assert home.next_step(0.0) is None
    assert home.reason_to_wait is Reason.AWAY

    for outgoing in (*announced, *dispatched):
        if outgoing.batch.dst == 2:
            experts.on_batch(outgoing.batch, 0.0)
    assert experts.next_step(0.0) is None, "the other home has not spoken"
    assert experts.reason_to_wait is Reason.HELD
    assert experts.next_step(1.5) is not None, "it has been waited for long enough"

    reasons = {(item.block, item.reason): item.count for item in home.decisions.snapshot()}
    assert reasons == {("attention", "only"): 1, ("none", "idle"): 1, ("none", "away"): 1}
    reasons = {(item.block, item.reason): item.count for item in experts.decisions.snapshot()}
    assert reasons == {("experts", "slip"): 1, ("none", "idle"): 1, ("none", "held"): 1}


def test_counts_are_by_block_and_reason():
    counts = DecisionCounts()
    assert counts.snapshot() == []
    counts.ran(BlockKind.EXPERTS, Reason.POLICY)
    counts.ran(BlockKind.EXPERTS, Reason.POLICY)
    counts.ran(BlockKind.HEAD, Reason.SLIP)
    counts.waited(Reason.IDLE)
    assert counts.snapshot() == [
        DecisionSnapshot("experts", "policy", 2),
        DecisionSnapshot("head", "slip", 1),
        DecisionSnapshot("none", "idle", 1),
    ]

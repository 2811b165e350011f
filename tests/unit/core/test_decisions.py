"""Every turn of a scheduler is counted with its reason."""

from __future__ import annotations

import pytest

from amoe.core.decisions import DecisionCounts
from amoe.policy.decision import Reason, reason_to_run
from amoe.stats import DecisionSnapshot
from amoe.types import BlockKind


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

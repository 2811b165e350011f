"""What a worker counts of its time: every second once, under what it was spent on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from amoe.core.decisions import DecisionCounts
from amoe.core.micro_queue import MicroQueues
from amoe.core.recovery import Losses
from amoe.core.steps import AttentionStep, ExpertsStep, ForwardStep, HeadStep
from amoe.engine.worker_stats import StatsKeeper
from amoe.policy.decision import Reason
from amoe.stats import WorkerStats
from amoe.types import BatchKind, BlockId, BlockKind

NONE = np.empty(0, np.int32)


def attention(layer: int, count: int) -> AttentionStep:
    slots = np.arange(count, dtype=np.int32)
    return AttentionStep(BlockId(BlockKind.ATTENTION, layer, 0), slots, slots, slots, count)


def head(count: int) -> HeadStep:
    slots = np.arange(count, dtype=np.int32)
    return HeadStep(BlockId(BlockKind.HEAD, 2), slots, slots)


def experts(ids: list[list[int]]) -> ExpertsStep:
    expert_ids = np.array(ids, np.int16)
    rows = np.arange(len(ids), dtype=np.int32)
    return ExpertsStep(BlockId(BlockKind.EXPERTS, 1, 0), rows, expert_ids, np.ones(expert_ids.shape, np.float32), [])


@pytest.fixture
def core() -> Any:
    """A core that holds attention and experts, and whose sequences are none of our business."""
    return SimpleNamespace(
        queues=MicroQueues(2, 1),
        attention=None,
        holds=lambda kind: True,
        batcher=None,
        decisions=DecisionCounts(),
        num_waves=0,
        num_slips=0,
    )


def test_busy_time_is_told_by_kind_of_block(core: Any):
    keeper = StatsKeeper(0, "colocated", 2, 4)
    keeper.observe(attention(0, 3), 0.5)
    keeper.observe(attention(1, 3), 0.25)
    keeper.observe(experts([[0, 2], [2, -1]]), 1.0)
    stats = keeper.snapshot(core, 9.0)
    assert stats.busy_by_block == {"attention": 0.75, "head": 0.0, "experts": 1.0}
    assert (stats.busy_s, stats.home_s, stats.experts_s, stats.steps) == (1.75, 0.75, 1.0, 3)
    assert stats.expert_pairs == [[0, 0, 0, 0], [1, 0, 2, 0]]


def dispatch(count: int) -> Any:
    return SimpleNamespace(kind=BatchKind.DISPATCH, count=count)


def test_at_an_expert_worker_tokens_wait_for_others_in_queues_and_in_steps(core: Any):
    """Seven token-seconds: each of two tokens shares a step of a second with the other; one is in a queue for 2 s in
    which another step runs, and four that are found after it have come, on average, in the middle of it; who is queued
    while the worker sleeps, or comes to one that sleeps, does not wait for it."""
    keeper = StatsKeeper(0, "experts", 2, 4)
    keeper.arrived([dispatch(2)])
    keeper.observe(experts([[0, 2], [2, -1]]), 1.0)
    keeper.arrived([])
    keeper.observe(experts([[1, 3]]), 2.0)
    core.queues.push(BlockId(BlockKind.EXPERTS, 1, 0), (np.zeros(1),), np.zeros(1, np.int32), 0.0)
    keeper.waited(core.queues.depth, 2.0, busy=True)
    keeper.arrived([dispatch(3), dispatch(1)])
    keeper.arrived([dispatch(100)])
    keeper.waited(core.queues.depth, 50.0)
    keeper.observe(experts([[1, 3]]), 3.0)
    keeper.slept(1.0, Reason.IDLE)
    keeper.arrived([dispatch(100)])
    assert keeper.snapshot(core, 9.0).expert_wait_s == pytest.approx(2 * 0.5 + 2.0 + 4 * 1.0)


def test_only_expert_workers_tell_of_waits_for_experts(core: Any):
    keeper = StatsKeeper(0, "colocated", 2, 4)
    keeper.observe(experts([[0, 2], [2, -1]]), 1.0)
    assert keeper.snapshot(core, 9.0).expert_wait_s == 0.0


def forward(num_tokens: int, wanted: list[int] | None = None) -> ForwardStep:
    slots = np.arange(num_tokens, dtype=np.int32)
    return ForwardStep(slots, slots, slots, num_tokens, wanted=None if wanted is None else np.array(wanted))


def blocks_of(stats: WorkerStats) -> dict[tuple[str, int], float]:
    return {(item.kind, item.layer): item.total for item in stats.batch_sizes}


def test_all_blocks_in_one_step_count_like_blocks_alone(core: Any):
    """As if attention(0), attention(1), experts(1) and the head had run one by one; layer 0 is dense."""
    keeper, apart = (StatsKeeper(0, "colocated", 2, 4, ridge_tokens=2) for _ in range(2))
    keeper.observe_forward(forward(2), {1: np.array([[0, 2], [2, 3]])}, np.array([[0.5, 0.0], [0.25, 1.0]]), 2.0)
    apart.observe(attention(0, 2), 0.5)
    apart.observe(attention(1, 2), 0.25)
    apart.observe(experts([[0, 2], [2, 3]]), 1.0)
    apart.observe(head(2), 0.25)
    told, wanted = keeper.snapshot(core, 9.0), apart.snapshot(core, 9.0)
    assert (told.steps, wanted.steps) == (1, 4)
    told.steps = wanted.steps
    assert told == wanted


def test_tokens_that_nobody_wants_to_see_end_before_the_last_experts(core: Any):
    keeper = StatsKeeper(0, "colocated", 2, 4)
    ids = {0: np.array([[0], [1], [1]]), 1: np.array([[3]])}
    keeper.observe_forward(forward(3, [2]), ids, np.ones((2, 2)), 5.0)
    none = {0: np.array([[0], [1], [1]]), 1: np.empty((0, 1), np.int64)}
    keeper.observe_forward(forward(3, []), none, np.array([[1.0, 1.0], [1.0, 0.0]]), 4.0)
    stats = keeper.snapshot(core, 9.0)
    assert stats.expert_pairs == [[2, 4, 0, 0], [0, 0, 0, 1]]
    sizes = {("attention", 0): 6.0, ("attention", 1): 6.0, ("experts", 0): 6.0, ("experts", 1): 1.0, ("head", 2): 1.0}
    assert blocks_of(stats) == sizes
    assert [sum(item.counts) for item in stats.batch_sizes if (item.kind, item.layer) == ("experts", 1)] == [1]
    assert stats.busy_by_block == {"attention": 2.0 + 3.0, "experts": 2.0 + 1.0, "head": 1.0}


def test_an_expert_worker_tells_of_experts_alone(core: Any):
    core.holds = lambda kind: kind is BlockKind.EXPERTS
    assert StatsKeeper(0, "experts", 2, 4).snapshot(core, 9.0).busy_by_block == {"experts": 0.0}


def test_sleep_is_told_by_reason(core: Any):
    keeper = StatsKeeper(0, "colocated", 2, 4)
    keeper.slept(0.5, Reason.AWAY)
    keeper.slept(0.25, Reason.HELD)
    keeper.slept(0.25, Reason.HELD)
    assert keeper.snapshot(core, 9.0).wait_s == {"idle": 0.0, "away": 0.5, "held": 0.5}


def test_what_lost_workers_cost_is_told(core: Any):
    class Waiting(list[int]):
        num_aside = 0

    batcher = SimpleNamespace(
        running=[],
        waiting=Waiting(),
        blocks=SimpleNamespace(num_used=0, num_blocks=0, num_queries=0, num_hits=0),
        slots=SimpleNamespace(num_slots=4, num_free=4),
        num_preemptions=0,
    )
    recovery = SimpleNamespace(losses=Losses(redone=7, resent=3), num_parked=2)
    core.batcher = batcher
    core.attention = SimpleNamespace(
        recovery=recovery, capacity=None, join_waits=SimpleNamespace(snapshot=lambda _: [])
    )
    stats = StatsKeeper(0, "colocated", 2, 4).snapshot(core, 9.0)
    assert (stats.redone_tokens, stats.resent_tokens, stats.parked_tokens) == (7, 3, 2)

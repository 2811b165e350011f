"""Each schedule against an oracle that is written to be read; nobody starves."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoe.config import BLOCK_SCHEDULES, SchedulerConfig
from amoe.policy import scheduler
from amoe.policy.scheduler import (
    NEVER,
    QueueView,
    choose_block,
    expired,
    lookahead_matrix,
    make_policy,
    num_stages,
    progress,
)
from amoe.policy.wave_order import WaveOrder


@dataclass
class Block:
    """One entry of a view, as a person would write it down."""

    number: int
    depth: int
    oldest: float = 0.0
    kappa: int = 0
    ready: bool = True


def view_of(blocks):
    return QueueView(
        np.asarray([block.ready for block in blocks]),
        np.asarray([block.depth for block in blocks], np.int64),
        np.asarray([block.oldest for block in blocks], np.float64),
        np.asarray([block.kappa for block in blocks], np.int64),
    )


@st.composite
def block_lists(draw):
    """Blocks of one wave, some empty; progress keys belong to their stage."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    stages = num_stages(draw(st.integers(1, 5)))
    depths = [rng.choice([0, 0, 1, 2, 7, 300]) for _ in range(stages)]
    return [
        Block(stage, depth, rng.uniform(0, 9), rng.randrange(50) * stages + stage)
        if depth
        else Block(stage, 0, math.inf, NEVER, ready=False)
        for stage, depth in enumerate(depths)
    ]


def oracle(name, blocks, delta=0.8, lookahead=4):
    """The numbers of the blocks that a schedule may choose."""
    ready = [block for block in blocks if block.ready]
    worth = {
        "fcfs": lambda block: -block.oldest,
        "flfs": lambda block: -block.number,
        "mtfs": lambda block: block.depth,
        "progress": lambda block: -block.kappa,
        "waves": lambda block: -block.kappa,
        "lockstep": lambda block: -block.kappa,
        "defrag": lambda block: algorithm_1(blocks, delta, lookahead)[block.number],
    }[name]
    best = max(map(worth, ready))
    return [block.number for block in ready if worth(block) >= best - 1e-9]


def algorithm_1(blocks, delta, num_lookahead):
    """Algorithm 1 of AMoE as the paper prints it, once per ring: {block number: score}.

    Q[b][e] is the queue of expert e of layer b; ours holds all experts of a layer in one queue, so NE is one.
    """
    num_layers = (len(blocks) - 1) // 2
    attention_ring = [blocks[2 * layer] for layer in range(num_layers)] + [blocks[2 * num_layers]]
    experts_ring = [blocks[2 * layer + 1] for layer in range(num_layers)]
    scores = {}
    for ring in (attention_ring, experts_ring):
        queues = [[block.depth] for block in ring]
        num_blocks, num_experts = len(queues), 1
        for b in range(num_blocks):
            ahead = 0.0
            for k in range(1, num_lookahead + 1):
                ahead += delta**k * sum(queues[(b + k) % num_blocks]) / num_experts
            for e in range(num_experts):
                if queues[b][e] > 0:
                    scores[ring[b].number] = queues[b][e] + ahead
    return scores


@pytest.mark.parametrize("name", BLOCK_SCHEDULES)
@given(blocks=block_lists())
def test_every_schedule_chooses_what_its_oracle_would(name, blocks):
    policy = make_policy(SchedulerConfig(schedule=name), (len(blocks) - 1) // 2)
    view = view_of(blocks)
    chosen = choose_block(policy, view, now=0.0, max_wait_s=math.inf)
    if not any(block.ready for block in blocks):
        assert chosen is None
    else:
        assert chosen in oracle(name, blocks)


@given(blocks=block_lists(), delta=st.floats(0, 1), lookahead=st.integers(0, 12))
def test_defrag_is_algorithm_1_for_any_decay_and_lookahead(blocks, delta, lookahead):
    if any(block.ready for block in blocks):
        config = SchedulerConfig(schedule="defrag", defrag_decay=delta, defrag_lookahead=lookahead)
        policy = make_policy(config, (len(blocks) - 1) // 2)
        assert policy(view_of(blocks)) in oracle("defrag", blocks, delta, lookahead)


@given(blocks=block_lists(), ready=st.lists(st.booleans(), min_size=11, max_size=11), now=st.floats(0, 20))
def test_in_lockstep_ready_blocks_run_though_they_are_empty_and_others_wait_though_they_are_full(blocks, ready, now):
    for block in blocks:
        block.ready = ready[block.number]
        block.kappa = block.number if block.ready else NEVER
    policy = make_policy(SchedulerConfig(schedule="lockstep"), (len(blocks) - 1) // 2)
    chosen = choose_block(policy, view_of(blocks), now, max_wait_s=5.0)
    numbers = [block.number for block in blocks if block.ready]
    assert chosen in numbers if numbers else chosen is None


@pytest.mark.parametrize("name", BLOCK_SCHEDULES)
@given(blocks=block_lists(), now=st.floats(0, 20), max_wait=st.floats(0.01, 10))
def test_who_has_waited_too_long_goes_first_and_the_oldest_of_them_before_all(name, blocks, now, max_wait):
    policy = make_policy(SchedulerConfig(schedule=name), (len(blocks) - 1) // 2)
    chosen = choose_block(policy, view_of(blocks), now, max_wait)
    late = [block for block in blocks if block.ready and now - block.oldest > max_wait]
    if late:
        assert blocks[chosen].oldest == min(block.oldest for block in late)


def test_the_rings_of_the_lookahead_written_out():
    """Two layers: attention(0) → attention(1) → head → attention(0); experts(0) → experts(1) → experts(0)."""
    matrix = lookahead_matrix(num_layers=2, num_waves=1, decay=0.5, lookahead=4)
    a, b, c, d = 0.5, 0.25, 0.125, 0.0625
    attention_0, experts_0, attention_1, experts_1, head = range(5)
    expected = np.zeros((5, 5))
    ring = [attention_0, attention_1, head]
    for position in range(3):
        following = [ring[(position + k) % 3] for k in (1, 2, 3)]
        expected[ring[position], following] = [a + d, b, c]
    expected[experts_0, [experts_1, experts_0]] = [a + c, b + d]
    expected[experts_1, [experts_0, experts_1]] = [a + c, b + d]
    np.testing.assert_allclose(matrix, expected)


def test_the_lookahead_stays_within_a_wave():
    one = lookahead_matrix(num_layers=3, num_waves=1, decay=0.8, lookahead=4)
    two = lookahead_matrix(num_layers=3, num_waves=2, decay=0.8, lookahead=4)
    np.testing.assert_array_equal(two[:7, :7], one)
    np.testing.assert_array_equal(two[7:, 7:], one)
    assert not two[:7, 7:].any()
    assert not two[7:, :7].any()


def test_without_lookahead_defrag_is_mtfs():
    matrix = lookahead_matrix(num_layers=2, num_waves=1, decay=0.8, lookahead=0)
    assert not matrix.any()
    blocks = [Block(0, 3), Block(1, 4), Block(2, 0, ready=False), Block(3, 4), Block(4, 1)]
    assert scheduler.defrag(view_of(blocks), matrix) == scheduler.mtfs(view_of(blocks)) == 1


def test_a_full_queue_downstream_draws_the_tokens_that_can_still_join_it():
    """attention(1) holds 10 tokens. Next to it, one token before it is worth more than two behind it."""
    policy = make_policy(SchedulerConfig(schedule="defrag", defrag_lookahead=1), 3)
    depths = [1, 0, 0, 0, 2, 0, 0]
    blocks = [Block(number, depth, ready=depth > 0) for number, depth in enumerate(depths)]
    assert policy(view_of(blocks)) == 4
    blocks[2].depth, blocks[2].ready = 10, False
    assert policy(view_of(blocks)) == 0


@pytest.mark.parametrize(("num_waves", "num_layers"), [(1, 3), (2, 3), (3, 4), (4, 10)])
def test_waves_that_start_together_draw_apart(num_waves, num_layers):
    """One worker, every wave always ready: in the long run wave j is ¾·j·S/W stages behind wave 0."""
    stages = num_stages(num_layers)
    order = WaveOrder(stages, num_waves)
    handicap = order.handicaps(num_waves + 1).reshape(-1, stages)[:num_waves, 0]
    kappa = np.zeros(num_waves, np.int64)
    for _ in range(num_waves * stages * 5):
        ready = np.ones(num_waves, np.bool_)
        view = QueueView(ready, np.ones(num_waves, np.int64), np.zeros(num_waves), kappa + handicap)
        kappa[choose_block(progress, view, now=0.0, max_wait_s=math.inf)] += 1
    assert (abs(kappa[0] - kappa - handicap) <= 1).all()


def test_a_hold_ends_when_the_oldest_token_has_waited_long_enough():
    oldest = np.array([0.0, 0.5, 1.0, math.inf])
    assert expired(oldest, now=1.5, max_hold_s=1.0).tolist() == [True, True, False, False]


def test_nothing_ready_is_nothing_to_run():
    for name in BLOCK_SCHEDULES:
        blocks = [Block(number, 0, math.inf, NEVER, ready=False) for number in range(5)]
        assert choose_block(make_policy(SchedulerConfig(schedule=name), 2), view_of(blocks), 1e9, 0.5) is None

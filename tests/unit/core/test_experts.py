"""The expert side of a worker, by hand."""

from __future__ import annotations

import numpy as np

from amoe.core.experts import ExpertsCore, count_pairs
from amoe.core.micro_queue import MicroQueues
from amoe.types import Batch, BatchKind, BlockId, BlockKind


def dispatch(src: int, slots: list[int], iteration: int, layer: int = 0) -> Batch:
    count = len(slots)
    return Batch(
        kind=BatchKind.DISPATCH,
        src=src,
        dst=2,
        layer=layer,
        count=count,
        slots=np.array(slots, np.int32),
        generations=np.zeros(count, np.int32),
        iterations=np.full(count, iteration, np.int32),
        expert_ids=np.tile(np.array([[1, -1]], np.int16), (count, 1)),
        expert_weights=np.full((count, 2), 0.5, np.float32),
    )


def make() -> tuple[ExpertsCore, MicroQueues]:
    queues = MicroQueues(num_layers=2, num_waves=1)
    return ExpertsCore(rank=2, home_ranks=(0, 1), slots_per_home=10, queues=queues, barrier=None), queues


def test_every_home_gets_one_answer_and_hears_how_far_the_others_are():
    core, queues = make()
    core.on_dispatch(dispatch(1, [3, 4], iteration=7), now=0.0)
    core.on_dispatch(dispatch(0, [5], iteration=900), now=1.0)
    core.on_dispatch(dispatch(1, [6], iteration=8), now=2.0)
    step = core.experts_step(queues.index(BlockId(BlockKind.EXPERTS, 0)))
    assert step.slab_rows.tolist() == [5, 13, 14, 16]
    replies = [(reply.batch.dst, reply.batch.slots.tolist(), reply.rows) for reply in step.replies]
    assert replies == [(0, [5], slice(0, 1)), (1, [3, 4, 6], slice(1, 4))]
    assert {reply.batch.latest_iteration for reply in step.replies} == {900}


def test_count_pairs():
    assert count_pairs(np.array([[0, -1], [2, 0]], np.int16), 4).tolist() == [2, 0, 1, 0]


def test_a_late_copy_overwrites_nothing():
    core, queues = make()
    assert core.on_dispatch(dispatch(0, [3, 4], iteration=1, layer=1), now=0.0).tolist() == [True, True]
    assert core.on_dispatch(dispatch(0, [4, 5], iteration=1, layer=0), now=1.0).tolist() == [False, True]
    step = core.experts_step(queues.index(BlockId(BlockKind.EXPERTS, 0)))
    assert step.slab_rows.tolist() == [5]


def test_experts_that_a_waiting_token_needs_are_known():
    queues = MicroQueues(num_layers=2, num_waves=3)
    core = ExpertsCore(rank=2, home_ranks=(0, 1), slots_per_home=10, queues=queues, barrier=None)
    first, others = np.arange(4) == 1, np.arange(4) != 1
    assert not core.awaits(0, first)
    batch = dispatch(1, [3, 4], iteration=7)
    batch.wave = 2
    core.on_dispatch(batch, now=0.0)
    assert core.awaits(0, first)
    assert not core.awaits(0, others), "a pair that is not there needs nobody"
    assert not core.awaits(1, first)
    core.experts_step(queues.index(BlockId(BlockKind.EXPERTS, 0, 2)))
    assert not core.awaits(0, first)


def test_a_step_without_some_of_its_tokens_answers_the_others():
    core, queues = make()
    core.on_dispatch(dispatch(0, [5], iteration=1), now=0.0)
    core.on_dispatch(dispatch(1, [3, 4, 6], iteration=1), now=0.0)
    step = core.experts_step(queues.index(BlockId(BlockKind.EXPERTS, 0)))
    rest = step.only(np.array([False, True, False, True]))
    assert rest.slab_rows.tolist() == [13, 16]
    assert (rest.expert_ids.shape, rest.expert_weights.shape) == ((2, 2), (2, 2))
    (reply,) = rest.replies
    assert (reply.batch.dst, reply.batch.count, reply.rows) == (1, 2, slice(0, 2))
    assert (reply.batch.slots.tolist(), len(reply.batch.generations)) == ([3, 6], 2)
    assert step.num_tokens == 4, "the step itself stays as it is"
    nothing = step.only(np.zeros(4, np.bool_))
    assert (nothing.num_tokens, nothing.replies) == (0, [])

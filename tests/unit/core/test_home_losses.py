"""What one home does about lost experts, seen from inside: who is asked again, what is told, who waits for whom."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from amoe.config import CapacityConfig, EngineConfig, FailureConfig, PlacementConfig, SchedulerConfig
from amoe.core.members import NOBODY, Roster
from amoe.core.routed_experts import take_routed
from amoe.core.steps import AttentionStep, Outgoing
from amoe.core.worker import ModelShape, WorkerCore
from amoe.policy.capacity import RoutedBatch, reroute
from amoe.types import Batch, BatchKind, SamplingParams

NUM_EXPERTS, TOP_K, BLOCK = 4, 2, 16
HOME, LEFT, RIGHT = 0, 1, 2  # ranks: experts 0 and 1 live at LEFT, 2 and 3 at RIGHT
OWNERS = np.repeat(np.array([[[0], [0], [1], [1]]], np.int16), 2, axis=0)
SCORES = np.array([0.4, 0.1, 0.3, 0.2], np.float32)  # by expert, of every token


class Home:
    """A home with two layers of experts at two workers, without a cluster: it is told what they say."""

    def __init__(
        self, schedule: str = "fcfs", on_expert_loss: str = "wait", capacity: CapacityConfig | None = None
    ) -> None:
        config = EngineConfig(
            model="fake",
            placement=PlacementConfig(attention_workers=1, expert_workers=2),
            scheduler=SchedulerConfig(schedule=schedule, num_waves=1 if schedule == "waves" else None),
            failure=FailureConfig(on_expert_loss=on_expert_loss),
            capacity=capacity or CapacityConfig(),
        )
        shape = ModelShape((True, True), NUM_EXPERTS)
        self.core = WorkerCore(config, shape, HOME, num_kv_blocks=64, max_model_len=64, owners=OWNERS)
        self.attention = self.core.attention
        self.batcher = self.attention.batcher
        self.version = 0

    def add(self, request_id: int, num_tokens: int = 1, **params) -> None:
        params = SamplingParams(max_tokens=4, **params)
        self.batcher.add(request_id, np.arange(num_tokens, dtype=np.int32), params)
        for outgoing in self.core.start(0.0):
            if outgoing.batch.dst == HOME:
                self.core.on_batch(outgoing.batch, 0.0)

    def attend(self, *topk_ids: tuple[int, int]) -> list[Batch]:
        """Run the attention block that is ready; its tokens go to these experts."""
        step = self.core.next_step(0.0)
        assert isinstance(step, AttentionStep)
        assert step.num_tokens == len(topk_ids)
        if not topk_ids:  # as the engine's home does
            nothing = np.empty((0, 1))
            return said(self.attention.on_attention(step, nothing.astype(np.int64), nothing.astype(np.float32), 0.0))
        ids = np.array(topk_ids)
        scores = np.tile(SCORES, (len(ids), 1))
        return said(self.attention.on_attention(step, ids, SCORES[ids], 0.0, scores))

    def tell(self, left: int, right: int, owners: np.ndarray = OWNERS) -> list[Batch]:
        """The lives of the two workers are others now, or experts live elsewhere."""
        self.version += 1
        return said(self.core.on_roster(Roster(self.version, (0, left, right), owners), 0.0))

    def answer(self, dispatch: Batch, incarnation: int = 0, now: float = 0.0) -> None:
        columns = {"slots": dispatch.slots, "generations": dispatch.generations}
        batch = Batch(BatchKind.RESULT, dispatch.dst, HOME, dispatch.layer, count=dispatch.count, **columns)
        batch.src_incarnation = incarnation
        assert self.core.on_batch(batch, now).all()


def said(outgoing: list[Outgoing]) -> list[Batch]:
    return [item.batch for item in outgoing if item.batch.count]


def pairs_at(batches: list[Batch]) -> dict[int, list[list[int]]]:
    """Experts that each worker is asked for, token by token."""
    return {batch.dst: [sorted(set(row.tolist()) - {-1}) for row in batch.expert_ids] for batch in batches}


def test_a_step_without_tokens_makes_nobody_forget_what_others_wait_for():
    home = Home()
    home.add(1)
    home.attend((0, 2))
    home.add(2)
    home.batcher.abort(2)
    home.attend()  # of the one that is gone
    assert pairs_at(home.tell(left=1, right=0)) == {LEFT: [[0]], RIGHT: [[2]]}


@pytest.mark.parametrize("moves", [True, False])
def test_a_token_for_an_expert_that_has_moved_is_redone_though_its_owner_answers_others(moves):
    home = Home()
    for request_id in (1, 2):
        home.add(request_id)
    left, right = home.attend((0, 2), (1, 2))
    patience = 1.0  # half the timeout
    one = replace(left, slots=left.slots[1:], generations=left.generations[1:], count=1)
    others = OWNERS.copy()
    others[:, 0] = 1
    assert home.tell(left=0, right=0, owners=others if moves else OWNERS) == []
    home.answer(right)
    home.answer(one, now=patience - 0.1)  # it had got the other token before
    assert said(home.attention.recovery.retry(patience - 0.05)) == []
    again = said(home.attention.recovery.retry(patience + 0.5))
    assert pairs_at(again) == ({RIGHT: [[0, 2]]} if moves else {})


def test_what_is_told_of_experts_is_what_computes_in_the_end():
    home = Home(on_expert_loss="reroute")
    home.add(1, return_routed_experts=True)
    home.attend((0, 2))
    # On its way already, it loses expert 0, and in its place gets the best that is there and that it has not.
    (dispatch,) = home.tell(left=NOBODY, right=0)
    assert pairs_at([dispatch]) == {RIGHT: [[2, 3]]}
    home.answer(dispatch)
    home.tell(left=1, right=0)
    home.attend((0, 3))
    (dispatch,) = home.tell(left=1, right=NOBODY)  # the same behind the last layer, of which all is told by then
    assert pairs_at([dispatch]) == {LEFT: [[0, 1]]}
    (sequence,) = home.batcher.running.values()
    told = np.frombuffer(take_routed(sequence), "<i2").reshape(1, 2, TOP_K)
    assert np.sort(told, axis=-1).tolist() == [[[2, 3], [0, 1]]]


def test_what_is_told_of_a_prompt_is_amended_where_it_belongs():
    """Of a prompt only its last token goes to the last experts."""
    home = Home(on_expert_loss="reroute")
    home.add(1, num_tokens=3, return_routed_experts=True)
    for batch in home.attend((0, 1), (0, 1), (0, 1)):
        home.answer(batch)
    home.attend((0, 1), (0, 1), (0, 2))
    home.tell(left=NOBODY, right=0)
    (sequence,) = home.batcher.running.values()
    told = np.frombuffer(take_routed(sequence), "<i2").reshape(3, 2, TOP_K)
    assert told[:, 0].tolist() == [[0, 1]] * 3
    assert told[:2, 1].tolist() == [[-1, -1]] * 2
    assert sorted(told[2, 1].tolist()) == [2, 3]


def test_a_chunk_with_a_token_that_nobody_can_compute_marches_alone_as_a_whole():
    home = Home("waves")
    home.add(1, num_tokens=2)
    left, _ = home.attend((0, 1), (2, 3))
    home.answer(left)
    assert home.tell(left=0, right=NOBODY) == []  # the second token waits, and the first one with it
    lanes = home.batcher.join.lane[home.batcher.members[int(home.batcher.tokens.leader[left.slots[0]])]]
    assert lanes.tolist() == [1, 1]
    assert home.batcher.join.outstanding.tolist() == [0, 1]
    (again,) = home.tell(left=0, right=1)
    home.answer(again, incarnation=1)
    home.attend((0, 1), (2, 3))
    assert home.batcher.join.outstanding[0] == 0, "the wave waits for a token that has left it"


@pytest.mark.parametrize("has_loss", [False, True])
def test_what_a_lost_expert_has_spoiled_is_found_by_nobody_later(has_loss):
    home = Home(on_expert_loss="reroute")
    home.tell(left=0, right=NOBODY if has_loss else 0)
    for _ in range(2):
        pairs = [(0, 2)] * BLOCK + [(0, 1)]
        home.add(len(home.batcher.table.sequences), num_tokens=BLOCK + 1, capacity="best_effort")
        (sequence,) = home.batcher.running.values()
        for _ in range(2):
            for batch in home.attend(*pairs[sequence.num_cached_tokens :]):
                home.answer(batch)
        home.tell(left=0, right=0)
        home.batcher.abort(sequence.request_id)
        assert home.core.next_step(0.0).num_tokens == 0  # the head, of the one that is gone
    assert sequence.num_cached_tokens == (0 if has_loss else BLOCK)


@pytest.mark.parametrize("scope", ["expert", "device"])
def test_nothing_is_rerouted_to_an_expert_that_nobody_holds(scope):
    """It looks as if it had room."""
    scores = np.tile(np.array([[0.4, 0.3, 0.2, 0.1]], np.float32), (4, 1))
    ids = np.tile(np.array([[0, 1]]), (4, 1))
    batch = RoutedBatch(ids, scores[:, :2], np.ones(4, np.bool_))
    group = np.array([0, 0, 1, 2]) if scope == "device" else np.arange(4)
    capacity = np.full(group.max() + 1, 2)
    everywhere = reroute(batch, group[ids], capacity, scores, group, keep_best=False)
    assert (everywhere.expert_ids == 2).any()
    there = np.array([True, True, False, True])
    selection = reroute(batch, group[ids], capacity, scores, group, is_there=there, keep_best=False)
    assert not (selection.expert_ids == 2).any()
    assert (selection.expert_ids == 3).any()


def test_what_is_sent_anew_counts_in_the_backlog_of_who_gets_it():
    home = Home(capacity=CapacityConfig(slack_s=1.0))
    home.add(1)
    home.attend((0, 2))
    home.tell(left=1, right=0)
    backlog = home.attention.capacity._backlog
    assert backlog._num_sent[:2].tolist() == [2, 2]

"""The join: whatever the order of the answers, every group goes on once, and nothing else counts."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from amoe.core.join import Join
from tests.unit.core.examples import examples

NUM_SLOTS, NUM_OWNERS = 12, 3


def int32(*values):
    return np.asarray(values, np.int32)


def answer(join, slots, owner, *, leader_of, layer=0, current=None):
    """What `AttentionCore.on_result` does. Returns the accepted rows and the groups that are complete."""
    slots = np.asarray(slots, np.int32)
    current = np.ones(len(slots), np.bool_) if current is None else current
    accepted = join.accept(slots, current, layer, owner)
    kept = slots[accepted]
    return accepted.tolist(), join.settle(kept, leader_of[kept], owner).tolist()


@st.composite
def groups(draw):
    """Slots in random order, cut into groups, each led by its last slot; at least one owner per token."""
    order = draw(st.permutations(range(NUM_SLOTS)))
    used = order[: draw(st.integers(1, NUM_SLOTS))]
    leader_of = np.arange(NUM_SLOTS, dtype=np.int32)
    start = 0
    while start < len(used):
        size = draw(st.integers(1, 4))
        leader_of[used[start : start + size]] = used[start : start + size][-1]
        start += size
    owner_sets = st.sets(st.integers(0, NUM_OWNERS - 1), min_size=1)
    owners = {slot: draw(owner_sets) for slot in used}
    return int32(*used), leader_of, owners


@examples(100)
@given(groups(), st.integers(0, 2**32))
def test_every_group_goes_on_once_when_its_last_answer_is_in(case, seed):
    slots, leader_of, owners = case
    rng = random.Random(seed)
    join = Join(NUM_SLOTS, NUM_OWNERS)
    dispatched = np.asarray([[owner in owners[slot] for owner in range(NUM_OWNERS)] for slot in slots.tolist()])
    join.open(slots, leader_of[slots], 3, dispatched, now=1.0)
    assert (join.dispatched[slots] == dispatched).all()
    pending = {(slot, owner) for slot in slots.tolist() for owner in owners[slot]}
    done: list[int] = []
    while pending:
        owner = rng.choice(sorted(owner for _, owner in pending))
        expected = sorted(slot for slot, other in pending if other == owner)
        rows = rng.sample(expected, rng.randint(1, len(expected)))
        rows += [rng.randrange(NUM_SLOTS) for _ in range(rng.randint(0, 4))]  # late ones, foreign ones, repeats
        rng.shuffle(rows)
        accepted, leaders = answer(join, rows, owner, leader_of=leader_of, layer=3)
        counted = [slot for slot, good in zip(rows, accepted, strict=True) if good]
        assert sorted(counted) == sorted({slot for slot in rows if (slot, owner) in pending}), "each awaited one once"
        pending -= {(slot, owner) for slot in counted}
        open_groups = {int(leader_of[slot]) for slot, _ in pending}
        complete = sorted({int(leader_of[slot]) for slot in counted} - open_groups)
        assert leaders == complete
        done += leaders
    assert sorted(done) == sorted(set(leader_of[slots].tolist()))
    assert (join._pending[leader_of[slots]] == 0).all()


def test_an_answer_that_comes_twice_counts_once():
    join, leader_of = Join(2, 2), np.arange(2, dtype=np.int32)
    join.open(int32(0), int32(0), 0, np.asarray([[True, True]]), 0.0)
    assert answer(join, [0], 0, leader_of=leader_of) == ([True], [])
    assert answer(join, [0], 0, leader_of=leader_of) == ([False], [])
    assert answer(join, [0], 1, leader_of=leader_of) == ([True], [0])
    assert answer(join, [0], 1, leader_of=leader_of) == ([False], [])


def test_an_answer_that_comes_twice_in_one_batch_counts_once():
    join, leader_of = Join(2, 2), np.arange(2, dtype=np.int32)
    join.open(int32(1), int32(1), 0, np.asarray([[True, True]]), 0.0)
    accepted, leaders = answer(join, [1, 1], 0, leader_of=leader_of)
    assert sorted(accepted) == [False, True]
    assert leaders == []
    assert answer(join, [1], 1, leader_of=leader_of) == ([True], [1])


def test_other_layers_old_generations_and_owners_not_asked_do_not_count():
    join, leader_of = Join(2, 2), np.arange(2, dtype=np.int32)
    join.open(int32(0), int32(0), 5, np.asarray([[True, False]]), 0.0)
    assert answer(join, [0], 0, leader_of=leader_of, layer=4) == ([False], [])
    assert answer(join, [0], 1, leader_of=leader_of, layer=5) == ([False], [])
    old = np.asarray([False])
    assert answer(join, [0], 0, leader_of=leader_of, layer=5, current=old) == ([False], [])
    assert answer(join, [0], 0, leader_of=leader_of, layer=5) == ([True], [0])


def test_a_cancelled_group_is_forgotten_and_its_slots_start_anew():
    join, leader_of = Join(4, 1), int32(2, 2, 2, 3)
    join.open(int32(0, 1, 2), int32(2, 2, 2), 1, np.ones((3, 1), np.bool_), 0.0)
    assert answer(join, [0], 0, leader_of=leader_of, layer=1) == ([True], [])
    join.cancel(int32(0, 1, 2))
    assert answer(join, [1, 2], 0, leader_of=leader_of, layer=1) == ([False, False], [])
    join.open(int32(2), int32(2), 1, np.ones((1, 1), np.bool_), 0.0)
    assert answer(join, [2], 0, leader_of=leader_of, layer=1) == ([True], [2])


def test_waits_are_measured_from_the_dispatch():
    join = Join(2, 1)
    join.open(int32(0, 1), int32(1, 1), 0, np.ones((2, 1), np.bool_), now=2.5)
    assert join.waits(int32(1), now=4.0).tolist() == [1.5]


def test_an_empty_batch_is_nothing():
    join = Join(2, 1)
    assert answer(join, [], 0, leader_of=int32(0, 1)) == ([], [])

"""Tables of experts that change while they are served: always complete, never crowded, and near the one before."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoe.errors import ConfigError
from amoe.policy.placement import experts_of, place_experts, replicate_experts
from amoe.policy.rebalance import (
    Room,
    are_held_elsewhere,
    copies_at,
    hottest,
    missing,
    moves,
    num_replicas,
    orders_for,
    rebalance,
    replicate,
    room_for,
    spread_to,
    union,
)


class Case(NamedTuple):
    """A table of a cluster, and what has happened to the cluster since."""

    load: np.ndarray
    owners: np.ndarray
    present: np.ndarray
    redundant: int
    speed: np.ndarray

    @property
    def num_owners(self) -> int:
        return len(self.present)

    @property
    def room(self) -> Room:
        return room_for(self.owners, self.present, self.redundant, self.speed)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Some owners at places up to a greatest number, which hold all experts; some of them go, and some others come."""
    num_owners, num_experts = draw(st.integers(1, 5)), draw(st.integers(5, 20))
    max_owners, redundant = draw(st.integers(num_owners, 7)), draw(st.integers(0, 3)) * (num_owners > 1)
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    load = rng.lognormal(0, draw(st.sampled_from([0.0, 0.5, 1.5])), (2, num_experts)) * 1000
    load[rng.random(load.shape) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = 0.0
    owners = place_experts(2, num_experts, num_owners)
    if redundant:
        owners = replicate_experts(rng.random((2, num_experts)), num_owners, -(-num_experts // num_owners) + redundant)
    present = np.array(draw(st.lists(st.booleans(), min_size=max_owners, max_size=max_owners).filter(any)))
    speed = rng.choice([0.25, 0.5, 1.0, 2.0], max_owners) if draw(st.booleans()) else np.ones(max_owners)
    return Case(load, owners, present, redundant, speed)


def check(case: Case, table: np.ndarray) -> None:
    """Whatever was planned: everybody's expert is somewhere, once at each owner, where there is room."""
    holds = copies_at(table, case.num_owners)
    assert holds.any(axis=-1).all()
    assert not holds[..., ~case.present].any()
    assert (holds.sum(axis=1) <= case.room.slots_per_owner).all()
    assert (holds.sum(axis=-1) == (table >= 0).sum(axis=-1)).all()  # nobody twice
    assert (table[..., 0] >= 0).all()
    assert (np.diff((table >= 0).astype(int), axis=-1) <= 0).all()  # no gap before a replica
    assert table.dtype == np.int16


@given(cases())
def test_a_rebalanced_table_is_complete_and_no_worse(case: Case) -> None:
    table = rebalance(case.load, case.owners, case.present, case.room, case.speed)
    check(case, table)
    assert np.array_equal(table, rebalance(case.load, case.owners, case.present, case.room, case.speed))
    again = rebalance(case.load, table, case.present, case.room, case.speed)
    assert not moves(table, again, case.num_owners, [True, True]).any(), "a table that was just made needs no move"
    holds = copies_at(case.owners, case.num_owners) & case.present
    is_lost, are_made = not holds.any(axis=-1).all(), (holds.sum(axis=(1, 2)) < case.room.wanted_copies).any()
    # A replica that is made for the day on which a worker dies may get no tokens until then: `hottest` gives it some.
    if not is_lost and not are_made and (case.redundant == 0 or (case.speed == 1).all()):
        smoothed = case.load + 0.05 * case.load.mean(axis=1, keepdims=True)
        before, after = (hottest(smoothed, owners, case.present, case.speed) for owners in (case.owners, table))
        assert after <= before * (1 + 1e-9)


@given(cases())
def test_a_spread_table_is_complete_and_touches_nobody_else(case: Case) -> None:
    old = copies_at(case.owners, case.num_owners)
    newcomers = case.present & ~old.any(axis=(0, 1))
    table = spread_to(case.load, case.owners, case.present, case.room, newcomers, case.speed)
    check(case, table)
    if not newcomers.any():
        return
    gained = moves(case.owners, table, case.num_owners, [True, True])
    stayed = (old & case.present).any(axis=-1)
    assert not gained[..., ~newcomers][stayed].any(), "only newcomers take what somebody present has"
    least_part = case.speed[newcomers].min() / case.speed[case.present].sum()
    if not case.load.any() and case.owners.shape[1] * least_part >= 1:  # else a newcomer may be worth no expert
        assert copies_at(table, case.num_owners)[..., newcomers].any(axis=(0, 1)).all()


@pytest.mark.parametrize(("num_owners", "redundant", "sigma"), [(2, 0, 1.0), (4, 4, 1.25), (8, 2, 1.25), (8, 0, 0.5)])
def test_few_moves_do_nearly_what_a_new_table_does(num_owners: int, redundant: int, sigma: float) -> None:
    load = np.random.default_rng(1).lognormal(0, sigma, (4, 64))
    slots, present = 64 // num_owners + redundant, np.ones(num_owners, np.bool_)
    owners = replicate_experts(np.ones((4, 64)), num_owners, slots)
    room = room_for(owners, present, redundant)
    assert room == Room(slots, 64 + num_owners * redundant, 64 + num_owners * redundant)
    ours = rebalance(load, owners, present, room)
    scratch = replicate_experts(load, num_owners, slots, anchored=False)
    assert hottest(load, ours, present) < hottest(load, scratch, present) + 0.12
    num_moves = [moves(owners, table, num_owners, [True] * 4).sum() for table in (ours, scratch)]
    assert num_moves[0] < 0.5 * num_moves[1]


def test_a_newcomer_takes_its_share_of_the_load_with_few_moves() -> None:
    load = np.random.default_rng(2).lognormal(0, 1, (4, 64))
    present, newcomers = np.ones(4, np.bool_), np.array([False, False, False, True])
    owners = rebalance(load, place_experts(4, 64, 3), present[:3], Room(22, 64))
    table = spread_to(load, owners, present, room_for(owners, present, 0), newcomers)
    holds = copies_at(table, 4)
    share = (load[..., None] * holds / holds.sum(axis=-1, keepdims=True)).sum(axis=1)[:, 3] / load.sum(axis=1)
    assert (share > 0.2).all()
    assert holds[..., 3].sum(axis=1).max() < 16  # fewer than an even number: what is hot goes first
    assert hottest(load, table, present) < 1.25 < hottest(load, owners, present)


def test_an_even_load_spreads_evenly_and_comes_back() -> None:
    owners, load = place_experts(1, 8, 2), np.zeros((1, 8))
    three, third = np.ones(3, np.bool_), np.array([False, False, True])
    table = spread_to(load, owners, three, room_for(owners, three, 0), third)
    assert sorted(copies_at(table, 3).sum(axis=1)[0]) == [2, 3, 3]
    assert moves(owners, table, 3, [True]).sum() == 2
    two = ~third
    back = spread_to(load, table, two, room_for(table, two, 0), np.zeros(3, np.bool_))
    assert copies_at(back, 3).sum(axis=1)[0].tolist() == [4, 4, 0]
    assert moves(table, back, 3, [True]).sum() == 2


def test_redundancy_that_was_asked_for_is_there_however_many_workers_there_are() -> None:
    """Two workers that hold everything, then three, four, and two again: always 8 experts more each than their part."""
    load = np.random.default_rng(3).lognormal(0, 0.5, (2, 16))
    owners = replicate_experts(load, 2, 16)
    nobody, there = np.zeros(4, np.bool_), np.array([True, True, False, False])
    assert num_replicas(owners, [True, True]) == 2 * 2 * 8
    for newcomer in (2, 3):
        there[newcomer] = True
        owners = spread_to(load, owners, there, room_for(owners, there, 8), np.arange(4) == newcomer)
        assert num_replicas(owners, [True, True]) >= 2 * 8 * there.sum()
        assert (copies_at(owners, 4)[..., newcomer].sum(axis=1) >= 8).all()
    for leaving in (3, 2):
        there[leaving] = False
        owners = spread_to(load, owners, there, room_for(owners, there, 8), nobody)
        assert num_replicas(owners, [True, True]) >= 2 * 8 * there.sum()
    assert copies_at(owners, 4)[..., :2].all(), "one may die, and nobody waits"


def test_who_is_four_times_slower_gets_a_quarter_of_the_others_work() -> None:
    """Without replicas: experts move, until all take as long. With the same experts for everybody, 16 against 4."""
    load, speed, present = np.ones((2, 36)) * 1000, np.array([1.0, 0.25, 1.0]), np.ones(3, np.bool_)
    owners = place_experts(2, 36, 3)
    room = room_for(owners, present, 0, speed)
    assert room == Room(16, 36, 36)
    table = rebalance(load, owners, present, room, speed)
    assert copies_at(table, 3).sum(axis=1).tolist() == [[16, 4, 16]] * 2
    assert hottest(load, table, present, speed) == pytest.approx(1.0)
    assert hottest(load, owners, present, speed) == pytest.approx(3.0)
    skewed = np.random.default_rng(4).lognormal(0, 1, (2, 36))
    table = rebalance(skewed, owners, present, room, speed)
    assert hottest(skewed, table, present, speed) < 1.3
    slow = (skewed[..., None] * copies_at(table, 3)).sum(axis=1)[:, 1] / skewed.sum(axis=1)
    assert (slow < 0.15).all()


def test_replicas_that_leave_with_their_owner_are_made_anew_where_it_is_hot() -> None:
    owners = np.array([[[0, 2], [0, -1], [1, -1], [1, -1]]], np.int16)  # owner 2 held a replica of expert 0 alone
    present = np.array([True, True, False])
    table = spread_to(np.array([[9.0, 1, 1, 1]]), owners, present, Room(3, 5), np.zeros(3, np.bool_))
    assert copies_at(table, 3)[0, 0].tolist() == [True, True, False]
    assert moves(owners, table, 3, [True]).sum() == 1


def test_replicas_move_to_what_has_become_hot() -> None:
    owners = replicate_experts(np.array([[9.0, 1, 1, 1, 1, 1]]), 2, 4)
    assert (owners[0, 0] >= 0).all()
    present, load = np.ones(2, np.bool_), np.array([[1.0, 1, 1, 1, 1, 9]])
    table = rebalance(load, owners, present, room_for(owners, present, 1))
    assert (table[0, 5] >= 0).all()
    assert hottest(load, table, present) < 1.1


def test_primaries_alone_are_level_too() -> None:
    """All homes begin with them."""
    owners = np.array([[[0, 1], [0, 1], [0, 1], [0, 1]]], np.int16)
    present, load = np.ones(2, np.bool_), np.array([[4.0, 3, 2, 1]])
    table = rebalance(load, owners, present, room_for(owners, present, 2))
    primaries = np.bincount(table[0, :, 0], weights=load[0])
    assert primaries.tolist() == [5.0, 5.0]


def test_no_room_is_told() -> None:
    owners = place_experts(1, 8, 4)
    with pytest.raises(ConfigError, match="1 expert workers with room for 2 experts of a layer each cannot hold 8"):
        rebalance(np.ones((1, 8)), owners, np.array([True, False, False, False]), Room(2, 8))


@given(cases(), st.data())
def test_replicate_gives_one_expert_as_many_owners_as_asked_for(case: Case, data: st.DataObject) -> None:
    owners = rebalance(case.load, case.owners, case.present, case.room, case.speed)
    count = data.draw(st.integers(1, int(case.present.sum())))
    expert = data.draw(st.integers(0, owners.shape[1] - 1))
    table = replicate(case.load, owners, case.present, 1, expert, count)
    old, new = copies_at(owners, case.num_owners), copies_at(table, case.num_owners)
    assert new[1, expert].sum() == count
    assert table[1, expert, 0] == owners[1, expert, 0]
    assert not new[..., ~case.present].any()
    changed = (old != new).any(axis=-1)
    changed[1, expert] = False
    assert not changed.any()
    assert (old[1, expert] <= new[1, expert]).all() or (old[1, expert] >= new[1, expert]).all()


@pytest.mark.parametrize(
    ("layer", "expert", "count", "message"),
    [
        (2, 0, 1, "layer 2 does not exist: the model has layers 0 to 1"),
        (0, -1, 1, "expert -1 does not exist: a layer has experts 0 to 3"),
        (0, 0, 3, "an expert can have 1 to 2 copies, as many as there are expert workers, not 3"),
        (0, 0, 0, "not 0"),
    ],
)
def test_replicate_names_what_is_wrong(layer: int, expert: int, count: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replicate(np.ones((2, 4)), place_experts(2, 4, 2), np.array([True, True, False]), layer, expert, count)


@given(cases())
def test_what_a_transition_holds_in_between(case: Case) -> None:
    new = rebalance(case.load, case.owners, case.present, case.room, case.speed)
    sparse = [True, False]
    for owner in range(case.num_owners):
        both = orders_for(union(case.owners, new), owner, sparse)
        parts = [experts_of(table, owner, sparse)[0] for table in (case.owners, new)]
        assert both == [sorted({*parts[0], *parts[1]}), []]
        gained = moves(case.owners, new, case.num_owners, sparse)
        assert set(np.flatnonzero(gained[0, :, owner]).tolist()) == set(parts[1]) - set(parts[0])
        assert not gained[1].any()


def test_what_others_hold_too() -> None:
    owners = np.array([[[0, -1], [0, -1]], [[0, 1], [1, 2]]], np.int16)
    everybody, dense_first = np.array([True, True, True]), [False, True]
    assert are_held_elsewhere(owners, 0, everybody, dense_first)
    assert are_held_elsewhere(owners, 0, np.array([False, True, False]), dense_first), "whether it is there or not"
    assert not are_held_elsewhere(owners, 0, np.array([True, False, True]), dense_first), "the other one has gone"
    assert not are_held_elsewhere(owners, 0, everybody, [True, True])
    assert are_held_elsewhere(owners, 1, everybody, dense_first)


def test_what_is_missing_and_what_is_there_twice() -> None:
    owners = np.array([[[0, 1], [1, -1]], [[0, -1], [1, -1]]], np.int16)
    assert missing(owners, np.array([True, True]), [True, True]) == 0
    assert missing(owners, np.array([True, False]), [True, True]) == 2
    assert missing(owners, np.array([True, False]), [True, False]) == 1
    assert num_replicas(owners, [True, True]) == 1
    assert num_replicas(owners, [False, True]) == 0

"""Work that late workers give up: against a slow oracle, and what must hold of any relief."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoe.policy.placement import replicate_experts
from amoe.policy.relief import (
    OVERDUE,
    OwnerPaces,
    count_cells,
    expected_waits,
    late_owners,
    redirect,
    relieve,
    work_of,
)


def late(was_late: np.ndarray, ends: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """Who is late where every batch is like this one."""
    return late_owners(was_late, ends, ends, usable)


class Layer:
    """One layer's replicas, a batch, and what is expected of the owners."""

    def __init__(self, seed: int, ridge_tokens: int) -> None:
        self.rng = rng = np.random.default_rng(seed)
        self.ridge = ridge_tokens
        self.num_owners, self.num_experts = int(rng.integers(2, 6)), int(rng.integers(6, 24))
        slots = -(-self.num_experts // self.num_owners) + int(rng.integers(1, 12))
        self.replicas = replicate_experts(np.ones((1, self.num_experts)), self.num_owners, slots)[0]
        self.holds = np.zeros((self.num_owners, self.num_experts), np.bool_)
        for expert, places in enumerate(self.replicas):
            self.holds[places[places >= 0], expert] = True
        shape = (int(rng.integers(1, 60)), 2)
        self.topk_ids = np.argsort(-rng.random((shape[0], self.num_experts)), axis=1)[:, :2]
        self.owners = np.array(
            [[rng.choice(self.replicas[e][self.replicas[e] >= 0]) for e in row] for row in self.topk_ids], np.int16
        )
        self.cells = count_cells(self.topk_ids, self.owners, self.num_owners, self.num_experts)
        wait = rng.choice([0.0, 0.0, 5.0, 50.0], self.num_owners) * rng.integers(1, 9, self.num_owners) / 8
        self.paces = OwnerPaces(
            wait, rng.choice([1.0, 1.0, 4.0, 0.25], self.num_owners), rng.choice([0.0, 4.0], self.num_owners)
        )  # sums without rounding
        self.late = late(np.zeros(self.num_owners, np.bool_), self.ends(self.cells), self.holds.any(axis=1))

    def ends(self, cells: np.ndarray) -> np.ndarray:
        work = work_of(cells, self.ridge).sum(axis=1)
        fixed = np.where(self.cells.any(axis=1), self.paces.step_s, 0.0)  # moving work away does not spare it
        return self.paces.wait_s + fixed + work * self.paces.unit_s

    def relief(self):
        return relieve(self.cells, self.holds, self.paces, self.ridge, self.late)

    def after(self) -> np.ndarray:
        owners = redirect(self.topk_ids, self.owners, self.relief())
        return count_cells(self.topk_ids, owners, self.num_owners, self.num_experts)


layers = st.builds(Layer, st.integers(0, 2**32), st.sampled_from([1, 3, 100]))


def relieve_slowly(layer: Layer) -> np.ndarray:
    """[D, E] pairs afterwards: expert by expert, everything counted anew after each."""
    cells = layer.cells.copy()
    first = layer.ends(cells)
    latest_first = sorted(np.flatnonzero(layer.late).tolist(), key=lambda owner: -first[owner])
    moved = set()
    for owner in [owner for owner in latest_first for _ in range(2)]:
        ends, lists = layer.ends(cells), {}
        for expert in np.flatnonzero(cells[owner]).tolist():
            if (owner, expert) in moved:
                continue
            takers = [o for o in range(layer.num_owners) if layer.holds[o, expert] and not layer.late[o]]
            if takers:
                lists.setdefault(min(takers, key=lambda o: ends[o]), []).append(expert)
        for place in sorted(lists, key=lambda place: ends[place]):

            def seconds(count, owner):
                return (max(count, layer.ridge) if count else 0) * layer.paces.unit_s[owner]

            def rank(expert, owner=owner, place=place):
                spared = seconds(cells[owner, expert], owner)
                there = cells[place, expert]
                return (seconds(cells[owner, expert] + there, place) - seconds(there, place)) / spared, spared

            for expert in sorted(lists[place], key=rank):
                here, there = int(cells[owner, expert]), int(cells[place, expert])
                before = layer.ends(cells)
                cells[owner, expert], cells[place, expert] = 0, here + there
                after = layer.ends(cells)
                if after[place] <= after[owner]:
                    moved.add((owner, expert))
                    continue
                gap = before[owner] - before[place]
                count = int(gap / layer.paces.unit_s[[owner, place]].sum())
                count = max(0, count)
                if min(here - count, there + count) < layer.ridge:
                    count = 0
                if after[place] >= before[owner] - count * layer.paces.unit_s[owner]:
                    cells[owner, expert], cells[place, expert] = here - count, there + count
                if cells[owner, expert] < here:
                    moved.add((owner, expert))
                break
    return cells


@given(layers)
def test_equals_the_oracle(layer):
    assert layer.after().tolist() == relieve_slowly(layer).tolist()


@given(layers)
def test_every_pair_is_computed_once_by_somebody_who_holds_the_expert(layer):
    after = layer.after()
    assert (after.sum(axis=0) == layer.cells.sum(axis=0)).all()
    assert not (after[~layer.holds] > 0).any()


@given(layers)
def test_nobody_ends_later_than_the_latest_would_have(layer):
    before, after = layer.ends(layer.cells), layer.ends(layer.after())
    assert after.max() <= before.max() * (1 + 1e-9)
    assert (after[layer.late] <= before[layer.late] * (1 + 1e-9)).all()


@given(layers)
def test_who_is_in_time_gives_nothing_away(layer):
    relief = layer.relief()
    assert not relief.amount[~layer.late].any()
    assert not layer.late[relief.target[relief.amount > 0]].any()


@given(layers, st.integers(0, 5))
def test_a_stalled_owner_gets_nothing_that_others_hold(layer, owner):
    owner %= layer.num_owners
    layer.paces.wait_s[owner] = 1e6
    layer.late = np.arange(layer.num_owners) == owner
    others = layer.holds[np.arange(layer.num_owners) != owner].any(axis=0)
    assert not layer.after()[owner, others].any()


@given(st.integers(2, 8), st.floats(1e-6, 1e3), st.floats(1e-6, 1e3))
def test_equal_owners_are_not_late(num_owners, wait_s, unit_s):
    ends = np.full(num_owners, wait_s + 7 * unit_s)
    usable = np.ones(num_owners, np.bool_)
    assert not late(np.zeros(num_owners, np.bool_), ends, usable).any()
    assert not late(usable, ends, usable).any()


def test_late_stays_late_until_it_is_near_the_others():
    none, first = np.zeros(3, np.bool_), np.array([True, False, False])
    usable = np.ones(3, np.bool_)
    ends = np.array([1.3, 1.0, 1.0])
    assert late(none, ends, usable).tolist() == [False] * 3
    assert late(first, ends, usable).tolist() == [True, False, False]
    assert late(first, np.array([1.15, 1.0, 1.0]), usable).tolist() == [False] * 3
    assert late(none, np.array([9.0, 1.0, 1.0]), usable).tolist() == [True, False, False]
    assert late(none, np.array([9.0, 1.0, 1.0]), first).tolist() == [False] * 3, "nobody to compare with"


def test_one_batch_makes_nobody_late_unless_he_has_stopped():
    none, usable, usual = np.zeros(3, np.bool_), np.ones(3, np.bool_), np.ones(3)
    assert late_owners(none, np.array([3.0, 1.0, 1.0]), usual, usable).tolist() == [False] * 3
    assert late_owners(none, np.array([5.0, 1.0, 1.0]), usual, usable).tolist() == [True, False, False]


def test_above_the_ridge_one_expert_is_divided():
    """Two owners, both hold the one expert; the first is three times slower: a quarter stays."""
    holds = np.ones((2, 1), np.bool_)
    cells, paces, late = (
        np.array([[400], [0]]),
        OwnerPaces(np.zeros(2), np.array([3.0, 1.0]), np.zeros(2)),
        np.array([True, False]),
    )
    relief = relieve(cells, holds, paces, 10, late)
    assert (relief.target.tolist(), relief.amount.tolist()) == ([[1], [1]], [[300], [0]])
    relief = relieve(cells, holds, paces, 200, late)
    assert relief.amount.tolist() == [[400], [0]], "what stayed would be read all the same"
    assert not relieve(cells, holds, paces, 10, ~late).amount.any()


@pytest.mark.parametrize(
    ("owed", "passed", "wait"),
    [(0.0, 9.0, 0.0), (4.0, 0.0, 8.0), (4.0, 5.0, 3.0), (4.0, 8.0, 0.0), (4.0, 16.0, 0.0), (4.0, 20.0, 4.0)],
)
def test_what_is_owed_runs_down_and_silence_counts_after_a_while(owed, passed, wait):
    assert OVERDUE == 2.0
    assert expected_waits(np.array([2.0 * owed]), np.array([passed])).tolist() == [wait]

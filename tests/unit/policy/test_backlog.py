"""Capacity in seconds of backlog: against the oracle, and what must hold whatever is known of the workers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoe.policy import backlog as fast
from amoe.policy import backlog_reference as slow
from amoe.policy.backlog import OwnerWaits
from amoe.policy.capacity import RoutedBatch
from tests.unit.policy.test_capacity import router


@dataclass
class Case:
    scores: np.ndarray
    batch: RoutedBatch
    main_owner: np.ndarray
    owners: np.ndarray
    waits: OwnerWaits
    late: np.ndarray
    keep_best: bool = True

    def lost(self) -> np.ndarray:
        return fast.late_pairs(self.batch, self.owners, self.waits, self.late, keep_best=self.keep_best)


def make_case(seed: int, num_tokens: int, num_owners: int, *, slack: float, known: float, keep_best: bool) -> Case:
    rng = np.random.default_rng(seed)
    num_experts, top_k = 4 * num_owners, min(3, 2 * num_owners)
    scores = router(rng, num_tokens, num_experts, 1.0)
    topk_ids = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
    main_owner = np.arange(num_experts) // 4
    batch = RoutedBatch(
        topk_ids,
        np.take_along_axis(scores, topk_ids, axis=1),
        rng.random(num_tokens) < 0.8,
        rng.random(num_tokens) < 0.2,
    )
    is_known = rng.random(num_owners) < known
    wait_s = rng.exponential(1.0, num_owners)
    row_s = rng.uniform(0.01, 0.1, num_owners)
    waits = OwnerWaits(wait_s, row_s, is_known, np.full(num_owners, slack))
    owners = main_owner[topk_ids].astype(np.int16)
    ends = fast.ends_of(fast.receivers(owners, num_owners), waits)
    late = fast.hysteresis(np.zeros(num_owners, np.bool_), ends, is_known, slack)
    return Case(scores, batch, main_owner, owners, waits, late, keep_best)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return make_case(
        draw(st.integers(0, 2**32)),
        draw(st.integers(0, 40)),
        draw(st.integers(1, 6)),
        slack=draw(st.sampled_from([0.3, 0.0, 1.0])),
        known=draw(st.sampled_from([1.0, 1.0, 0.7, 0.0])),
        keep_best=draw(st.booleans()),
    )


@given(cases(), st.booleans())
def test_what_is_dropped_is_the_oracles(case, all_late):
    if all_late:
        case.late = case.waits.is_known.copy()
    lost = case.lost()
    batch, waits = case.batch, case.waits
    expected = slow.late_pairs(
        case.owners.tolist(),
        batch.topk_scores.tolist(),
        batch.droppable.tolist(),
        batch.drop_first.tolist(),
        waits.wait_s.tolist(),
        waits.row_s.tolist(),
        waits.is_known.tolist(),
        waits.slack_s.tolist(),
        case.late.tolist(),
        keep_best=case.keep_best,
    )
    assert set(zip(*(index.tolist() for index in np.nonzero(lost)), strict=True)) == expected


@given(cases())
def test_what_must_hold(case):
    lost = case.lost()
    assert not lost[~case.batch.droppable].any()
    assert not lost.all(axis=1).any() or len(lost) == 0  # somebody always answers
    if case.keep_best:
        assert not lost[:, 0].any()
    for token in np.flatnonzero(lost.any(axis=1)):
        assert case.waits.is_known[case.owners[token]].all()
        for owner in set(case.owners[token][lost[token]].tolist()):
            assert lost[token][case.owners[token] == owner].all()  # half a row gains nothing
            assert case.late[owner]


def test_nothing_is_known_and_nothing_is_dropped():
    case = make_case(1, 64, 4, slack=0.0, known=0.0, keep_best=True)
    assert not case.late.any()
    case.late = np.ones(4, np.bool_)
    assert not case.lost().any()


@pytest.mark.parametrize("idle", [True, False])
def test_where_all_are_alike_nothing_is_dropped(idle):
    case = make_case(2, 400, 4, slack=0.5, known=1.0, keep_best=True)
    case.waits = OwnerWaits(np.full(4, 0.0 if idle else 9.0), np.full(4, 1e-5), np.ones(4, np.bool_), np.full(4, 0.5))
    case.late = np.ones(4, np.bool_)
    assert not case.lost().any()


def test_a_deep_queue_is_relieved_and_only_of_what_is_not_best():
    case = make_case(3, 400, 4, slack=0.1, known=1.0, keep_best=True)
    case.batch = replace(case.batch, droppable=np.ones(400, np.bool_), drop_first=None)
    case.waits = OwnerWaits(np.array([5.0, 0, 0, 0]), np.full(4, 1e-5), np.ones(4, np.bool_), np.full(4, 0.1))
    case.late = np.array([True, False, False, False])
    lost = case.lost()
    # Those who have their best expert there, or all, wait there anyway.
    relievable = (case.owners[:, 0] != 0) & (case.owners != 0).any(axis=1)
    assert (lost == ((case.owners == 0) & relievable[:, None])).all()


def test_what_stays_at_a_late_worker_ends_within_the_slack():
    """No queue anywhere, all tokens in one batch: as many rows stay as the paper's capacity would let stay."""
    case = make_case(4, 2000, 4, slack=0.0, known=1.0, keep_best=False)
    case.batch = replace(case.batch, droppable=np.ones(2000, np.bool_), drop_first=None)
    case.waits = OwnerWaits(np.zeros(4), np.full(4, 1e-3), np.ones(4, np.bool_), np.full(4, 0.1))
    rows = fast.receivers(case.owners, 4).sum(axis=0)
    case.late = rows == rows.max()
    lost = case.lost()
    kept = np.where(lost, -1, case.owners)
    after = fast.receivers(kept.astype(np.int16), 4).sum(axis=0)
    latest, others = int(rows.argmax()), np.delete(rows, rows.argmax())
    assert others.min() + 100 <= after[latest] <= others.max() + 100 + (case.owners == latest).all(axis=1).sum()


def test_waits_run_down_and_grow_with_what_is_sent():
    waits = fast.expected_waits(
        np.array([2.0, 0.5]), np.array([10.0, 10.0]), np.array([0, 7]), np.array([0.1, 0.1]), 11
    )
    np.testing.assert_allclose(waits, [1.0, 0.7])


def test_late_is_left_at_half_the_slack():
    known = np.ones(3, np.bool_)
    late = np.zeros(3, np.bool_)
    told = []
    for excess in (0.9, 1.1, 0.7, 0.4, 0.7):
        late = fast.hysteresis(late, np.array([excess, 0.0, 0.0]), known, 1.0)
        told.append(bool(late[0]))
    assert told == [False, True, True, False, False]


@given(cases())
def test_replicas_relieve_without_loss(case):
    rng = np.random.default_rng(1)
    num_owners = len(case.late)
    replicas = np.stack([case.main_owner, rng.integers(-1, num_owners, len(case.main_owner))], axis=1).astype(np.int16)
    replicas[replicas[:, 0] == replicas[:, 1], 1] = -1
    moved = fast.move_to_replicas(case.batch, case.owners, replicas, case.waits, case.late)
    held = (replicas[case.batch.topk_ids] == moved[..., None]).any(axis=-1)
    assert held.all()
    before = fast.ends_of(fast.receivers(case.owners, num_owners), case.waits)
    after = fast.ends_of(fast.receivers(moved, num_owners), case.waits)
    assert after.max(initial=0) <= before.max(initial=0) + case.waits.row_s.max()
    assert (moved == case.owners)[~case.late[case.owners]].all()


@given(cases())
def test_whoever_is_rerouted_finds_room(case):
    case.late = case.waits.is_known.copy()
    lost = case.lost()
    kept = np.where(lost, -1, case.owners).astype(np.int16)
    goes = fast.receivers(kept, len(case.late))
    noise = np.random.default_rng(0).random((len(lost), 2 * lost.shape[1]))
    late = np.random.default_rng(1).random(len(case.late)) < 0.3
    new = fast.two_choices(case.batch, lost, case.scores, case.main_owner, goes, case.waits, late, noise)
    assert (new.sum(axis=1) <= lost.sum(axis=1)).all()
    rows, experts = np.nonzero(new)
    for row, expert in zip(rows.tolist(), experts.tolist(), strict=True):
        assert expert not in case.batch.topk_ids[row]
        assert case.waits.is_known[case.main_owner[expert]]
        assert not late[case.main_owner[expert]]
    if len(rows):
        waits = case.waits
        limit = np.median(fast.ends_of(goes, waits)[waits.is_known]) + waits.slack_s
        added = np.bincount(case.main_owner[experts], minlength=len(limit))
        ends = fast.ends_of(goes, waits) + added * waits.row_s
        assert (ends[added > 0] <= limit[added > 0] + 1e-6).all()


def test_two_choices_spread_what_one_choice_would_pile_up():
    case = make_case(5, 3000, 4, slack=1.0, known=1.0, keep_best=True)
    lost = np.zeros(case.owners.shape, np.bool_)
    lost[:, -1] = True
    waits = OwnerWaits(np.array([0.0, 0.1, 0.2, 0.3]), np.full(4, 1e-9), np.ones(4, np.bool_), np.full(4, 1.0))
    noise = np.random.default_rng(0).random((3000, 6))
    goes = fast.receivers(case.owners, 4)
    new = fast.two_choices(case.batch, lost, case.scores, case.main_owner, goes, waits, np.zeros(4, np.bool_), noise)
    counts = np.bincount(case.main_owner[np.nonzero(new)[1]], minlength=4)
    assert (counts > 0.05 * counts.sum()).sum() >= 3 and counts[0] > counts[3]


def test_every_lost_pair_of_a_token_gets_its_two_choices():
    """There is room for all: as many pairs are found as are lost."""
    case = make_case(6, 200, 4, slack=1e6, known=1.0, keep_best=True)
    lost = np.zeros(case.owners.shape, np.bool_)
    lost[:, 1:] = True
    noise = np.random.default_rng(0).random((200, 6))
    goes = fast.receivers(case.owners, 4)
    new = fast.two_choices(
        case.batch, lost, case.scores, case.main_owner, goes, case.waits, np.zeros(4, np.bool_), noise
    )
    assert (new.sum(axis=1) == 2).all()


@given(st.lists(st.floats(0, 9), min_size=2, max_size=9))
def test_medians_of_others(values):
    expected = [np.median(values[:index] + values[index + 1 :]) for index in range(len(values))]
    np.testing.assert_allclose(fast.medians_of_others(np.array(values)), expected)


@pytest.mark.parametrize("others", [1, 2, 7])
def test_late_means_later_than_the_others(others):
    ends = np.array([1.1] + [0.0] * others)
    known = np.ones(len(ends), np.bool_)
    assert fast.hysteresis(np.zeros(len(ends), np.bool_), ends, known, 1.0).tolist() == [True] + [False] * others
    known[1:] = False
    assert not fast.hysteresis(np.zeros(len(ends), np.bool_), ends, known, 1.0).any(), "there is nobody to compare with"


def test_cost_is_fitted():
    rng, sums = np.random.default_rng(0), np.zeros(5)
    for _ in range(200):
        rows = int(rng.integers(1, 200))
        fast.observe_cost(sums, rows, 3e-4 + 2e-6 * rows)
    assert fast.linear_cost(sums) == pytest.approx((3e-4, 2e-6), rel=1e-3)
    assert fast.linear_cost(np.zeros(5)) == (0.0, 0.0)
    same = np.zeros(5)
    for _ in range(5):
        fast.observe_cost(same, 8, 1e-3)
    step, row = fast.linear_cost(same)
    assert step + 8 * row == pytest.approx(1e-3) and row >= 0

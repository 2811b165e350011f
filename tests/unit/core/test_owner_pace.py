"""What one home sees of its expert workers, and whom it relieves."""

from __future__ import annotations

import numpy as np
import pytest

from amoe.core.join import Join
from amoe.core.owner_pace import FORGET_S, OwnerPace
from amoe.core.replica_shares import ReplicaShares

NUM_OWNERS, NUM_EXPERTS, NUM_SLOTS = 3, 6, 24
SLOTS = np.arange(12, dtype=np.int32)
IDS = np.arange(24).reshape(12, 2) % NUM_EXPERTS  # four tokens for each expert
ALL = np.array([[[e % 3, (e + 1) % 3, (e + 2) % 3] for e in range(NUM_EXPERTS)]], np.int16)


class Home:
    """Dispatches the same batch again and again; owner o answers after `seconds[o]` per pair, None: never."""

    def __init__(self, owners: np.ndarray = ALL) -> None:
        self.join = Join(NUM_SLOTS, NUM_OWNERS + 1)
        self.replicas = ReplicaShares(owners, 0, NUM_OWNERS)
        self.pace = OwnerPace(self.replicas, self.join, ridge_tokens=1)
        self.now = 100.0

    def batch(self, seconds: list[float | None], slots: np.ndarray = SLOTS) -> list[int]:
        """Pairs of each owner."""
        chosen = self.pace.choose(0, IDS, self.now)
        dispatched = np.zeros((len(IDS), NUM_OWNERS + 1), np.bool_)
        dispatched[np.arange(len(IDS))[:, None], chosen] = True
        self.join.open(slots, slots, 0, dispatched, self.now)
        self.pace.sent(slots, IDS, chosen, dispatched, self.now)
        counts = np.bincount(chosen.ravel(), minlength=NUM_OWNERS).tolist()
        answers = [
            (count * each, owner) for owner, (count, each) in enumerate(zip(counts, seconds, strict=True)) if each
        ]
        for after, owner in sorted(answers):
            self.answer(owner, slots[dispatched[:, owner]], self.now + after)
        self.now += max((after for after, _ in answers), default=0.0) + 1e-3
        return counts

    def answer(self, owner: int, slots: np.ndarray, now: float) -> None:
        self.pace.heard(owner, slots, np.ones(len(slots), np.bool_), now)
        self.join.settle(slots, slots, owner)


def test_equal_workers_get_equal_shares():
    home = Home()
    assert all(home.batch([1e-3, 1e-3, 1e-3]) == [8, 8, 8] for _ in range(100))
    assert home.pace.num_relieved == 0


def test_a_slow_worker_gets_what_it_can_do_in_the_same_time():
    home = Home()
    for _ in range(100):
        counts = home.batch([1e-3, 4e-3, 1e-3])
    assert counts[1] == 3, "the others do 9 and 12 meanwhile"
    for _ in range(200):
        counts = home.batch([1e-3, 1e-3, 1e-3])
    assert counts == [8, 8, 8], "it is as fast as the others again"


def test_a_worker_that_stops_gets_nothing_new():
    home = Home()
    for _ in range(20):
        home.batch([1e-3, 1e-3, 1e-3])
    home.batch([1e-3, None, 1e-3])
    home.now += 0.1
    for _ in range(50):
        assert home.batch([1e-3, None, 1e-3], SLOTS + 12)[1] == 0


def test_what_only_one_worker_holds_stays_there():
    owners = ALL.copy()
    owners[0, 1, 1:] = -1  # expert 1 lives at owner 1 alone
    home = Home(owners)
    for _ in range(100):
        counts = home.batch([1e-3, 50e-3, 1e-3])
    assert counts[1] == 4


def test_who_got_nothing_for_a_while_is_tried_again():
    home = Home()
    for _ in range(100):
        counts = home.batch([1e-3, 50e-3, 1e-3])
    assert counts[1] == 0
    home.now += FORGET_S
    for _ in range(3):
        home.batch([1e-3, 1e-3, 1e-3])
    assert home.batch([1e-3, 1e-3, 1e-3]) == [8, 8, 8]


def test_a_lost_answer_that_nobody_waits_for_is_forgotten():
    home = Home()
    for _ in range(20):
        home.batch([1e-3, 1e-3, 1e-3])
    home.batch([1e-3, None, 1e-3])
    home.join.cancel(SLOTS)
    home.now += 0.1
    assert home.batch([1e-3, 1e-3, 1e-3]) == [8, 8, 8]


def test_a_duplicate_says_nothing_of_what_its_slot_waits_for_now():
    home = Home()
    home.batch([1e-3, None, 1e-3])
    owed = home.pace._owed[1]
    home.pace.heard(1, SLOTS, np.zeros(len(SLOTS), np.bool_), home.now)
    assert home.pace._owed[1] == owed > 0
    home.join.cancel(SLOTS)  # aborted: the answer comes all the same
    home.pace.heard(1, SLOTS, np.zeros(len(SLOTS), np.bool_), home.now)
    assert home.pace._owed[1] == 0


@pytest.mark.parametrize("changed", [True, False])
def test_of_another_life_nothing_is_known(changed):
    home = Home()
    for _ in range(100):
        home.batch([1e-3, 4e-3, 1e-3])
    home.pace.on_roster(np.array([False, changed, False]))
    home.replicas.place(ALL, np.ones(NUM_OWNERS, np.bool_))
    assert (home.batch([1e-3, 4e-3, 1e-3])[1] == 8) == changed


def test_what_is_sent_again_elsewhere_is_not_owed_any_more():
    home = Home()
    home.batch([1e-3, None, 1e-3])
    assert home.pace._owed[1] > 0
    few = IDS[:1]
    chosen = home.pace.choose(0, few, home.now)  # too few to be measured
    home.pace.sent(SLOTS, few, chosen, np.ones((1, NUM_OWNERS + 1), np.bool_), home.now)
    assert not home.pace._owed.any() and not home.pace._row_work.any()


def test_workers_that_may_come_one_day_make_no_batch_a_small_one():
    home = Home()
    wide = ReplicaShares(ALL, 0, 64)
    assert wide.num_holders == home.replicas.num_holders == [NUM_OWNERS]


def test_without_replicas_nothing_is_measured():
    home = Home(ALL[..., :1])
    for _ in range(20):
        assert home.batch([1e-3, 50e-3, 1e-3]) == [8, 8, 8]
    assert not home.pace._costs.any()

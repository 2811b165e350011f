"""Who is taken for dead, and when the next life begins."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoe.policy.patience import Patience, StepTime
from amoe.policy.supervision import FIRST_SIGN_S, RUNNING_TIMES, Crashes, LifeSigns, Loss, can_serve

TIMEOUT_S = 2.0
PATIENCE = Patience(TIMEOUT_S)
PERIOD_S = PATIENCE.sign_s
HOME, OTHER_HOME, OWNER, OTHER_OWNER = 0, 1, 2, 3
HOMES, OWNERS = {HOME, OTHER_HOME}, {OWNER, OTHER_OWNER}


class Cluster:
    """Four workers that give signs, unless they are told otherwise."""

    def __init__(self) -> None:
        self.signs = LifeSigns(TIMEOUT_S)
        self.quiet: set[int] = set()
        self.running: set[int] = set()
        self.owners = OWNERS
        self.oldest_s = dict.fromkeys((HOME, OTHER_HOME, OWNER, OTHER_OWNER), 0.0)
        self.waits: dict[tuple[int, int], float] = {}
        for rank in self.oldest_s:
            self.signs.expect(rank)
            self.signs.beat(rank, 0.0)

    def pass_time(self, seconds: float) -> list[Loss]:
        """Periods of life; what is found at the end of the first one that shows something."""
        for _ in range(round(seconds / PERIOD_S)):
            for rank in self.oldest_s.keys() - self.quiet:
                self.signs.beat(rank, self.oldest_s[rank])
            for pair in self.waits:
                self.waits[pair] += PERIOD_S
                if self.waits[pair] >= PATIENCE.named_s and pair[0] not in self.quiet:
                    self.signs.accuse(*pair, self.waits[pair])
            self.signs.advance(PERIOD_S)
            if found := self.signs.losses(HOMES, self.owners, self.running.__contains__):
                return found
        return []


def test_nobody_dies_who_gives_signs():
    assert Cluster().pass_time(100) == []


def test_who_is_silent_for_nearly_the_timeout_is_dead():
    cluster = Cluster()
    cluster.quiet.add(OWNER)
    assert cluster.pass_time(PATIENCE.silence_s - PERIOD_S) == []
    (loss,) = cluster.pass_time(2 * PERIOD_S)
    assert (loss.rank, loss.kind) == (OWNER, "silent")
    assert str(loss) == "has given no sign of life for 2.0 s"
    cluster.signs.forget(OWNER)
    assert cluster.pass_time(100) == []


def test_who_is_silent_because_the_machine_is_busy_has_more_time():
    cluster = Cluster()
    cluster.quiet.add(OWNER)
    cluster.running.add(OWNER)
    assert cluster.pass_time(RUNNING_TIMES * PATIENCE.silence_s - PERIOD_S) == []
    assert [loss.kind for loss in cluster.pass_time(2 * PERIOD_S)] == ["silent"]


def test_the_first_sign_may_take_longer():
    cluster = Cluster()
    cluster.quiet.add(OWNER)
    cluster.signs.expect(OWNER)
    assert cluster.pass_time(FIRST_SIGN_S - PERIOD_S) == []
    assert [loss.rank for loss in cluster.pass_time(PERIOD_S)] == [OWNER]


def test_a_step_has_a_limit():
    cluster = Cluster()
    cluster.quiet.add(OWNER)
    for second in range(1, 8):
        cluster.signs.pulse(OWNER, StepTime(float(second), 0.005))
        assert cluster.pass_time(1) == ([] if second < 7 else [Loss(OWNER, "hung", 7.0)])
    cluster.signs.beat(OWNER, 0.0)
    cluster.quiet.clear()
    assert cluster.pass_time(10) == []


def test_who_does_not_get_what_was_sent_is_cut_off():
    cluster = Cluster()
    cluster.waits[HOME, OWNER] = 0.0
    (loss,) = cluster.pass_time(100)
    assert (loss.rank, loss.kind) == (OWNER, "cut")
    assert TIMEOUT_S * 0.75 <= loss.seconds <= TIMEOUT_S


def test_a_new_life_whose_links_are_not_there_yet_is_not_cut_off():
    """Nor is who waits for it; afterwards, what still does not arrive is noticed as ever."""
    cluster = Cluster()
    cluster.signs.expect(OWNER, 5.0)
    cluster.waits[HOME, OWNER] = 0.0
    assert cluster.pass_time(5.0) == []
    (loss,) = cluster.pass_time(TIMEOUT_S)
    assert (loss.rank, loss.kind) == (OWNER, "cut")


def test_who_is_slow_is_not_cut_off():
    """What the home waits for lies in the worker's queue."""
    cluster = Cluster()
    cluster.waits[HOME, OWNER] = 0.0
    for _ in range(40):
        cluster.oldest_s[OWNER] = cluster.waits[HOME, OWNER]
        assert cluster.pass_time(PERIOD_S) == []


def test_an_answer_ends_the_suspicion():
    """A machine that was asleep: a home that wakes up first has waited for long, and is answered at once."""
    cluster = Cluster()
    cluster.signs.accuse(HOME, OWNER, 60.0)
    assert cluster.pass_time(PATIENCE.lapse_s + 1) == []
    cluster.signs.accuse(HOME, OWNER, 2.0)
    assert cluster.pass_time(100) == []


def test_a_home_that_reaches_nobody_is_cut_off_itself():
    cluster = Cluster()
    cluster.waits = {(HOME, OWNER): 0.0, (HOME, OTHER_OWNER): 0.0}
    assert [(loss.rank, loss.kind) for loss in cluster.pass_time(100)] == [(HOME, "cut")]


def test_owners_that_nobody_reaches_are_cut_off():
    cluster = Cluster()
    cluster.waits = {(home, owner): 0.0 for home in (HOME, OTHER_HOME) for owner in OWNERS}
    assert [(loss.rank, loss.kind) for loss in cluster.pass_time(100)] == [(OWNER, "cut"), (OTHER_OWNER, "cut")]


def test_a_home_that_has_sent_to_one_a_little_later_is_cut_off_all_the_same():
    """The first one's time is over a period earlier: that alone does not make it guilty."""
    cluster = Cluster()
    cluster.waits = {(HOME, OWNER): 0.0, (HOME, OTHER_OWNER): -PERIOD_S}
    assert [(loss.rank, loss.kind) for loss in cluster.pass_time(100)] == [(HOME, "cut")]


def test_who_was_slow_a_moment_ago_has_no_part_in_it():
    """An accusation that is not repeated says nothing of the home that is about to accuse another one."""
    cluster = Cluster()
    cluster.waits = {(HOME, OWNER): 0.0, (HOME, OTHER_OWNER): 0.0}
    assert cluster.pass_time(0.75) == []
    del cluster.waits[HOME, OTHER_OWNER]
    assert [(loss.rank, loss.kind) for loss in cluster.pass_time(100)] == [(OWNER, "cut")]


@pytest.mark.parametrize("alone", range(3))
def test_of_colocated_workers_the_one_that_nobody_reaches_is_cut_off(alone):
    """All the others wait for it, and it for all of them."""
    signs, others = LifeSigns(TIMEOUT_S), [rank for rank in range(3) if rank != alone]
    for rank in range(3):
        signs.expect(rank)
        signs.beat(rank, 0.0)
    found: list[Loss] = []
    for number in range(1, 100):
        for rank in range(3):
            signs.beat(rank, 0.0)
        for other in others:
            signs.accuse(alone, other, number * PERIOD_S)
            signs.accuse(other, alone, number * PERIOD_S)
        signs.advance(PERIOD_S)
        if found := signs.losses({0, 1, 2}, {0, 1, 2}, lambda _: False):
            break
    assert [(loss.rank, loss.kind) for loss in found] == [(alone, "cut")]


def test_a_home_that_does_not_reach_the_only_owner_is_cut_off_if_another_does():
    """Its owner serves the other one: to replace that would make both stand still."""
    cluster = Cluster()
    cluster.owners = {OWNER}
    cluster.waits = {(HOME, OWNER): 0.0}
    assert [(loss.rank, loss.kind) for loss in cluster.pass_time(100)] == [(HOME, "cut")]
    cluster.signs.forget(HOME)
    cluster.waits = {(OTHER_HOME, OWNER): 0.0, (HOME, OWNER): 0.0}
    cluster.signs.expect(HOME)
    assert [(loss.rank, loss.kind) for loss in cluster.pass_time(100)] == [(OWNER, "cut")], "nobody reaches it"


def test_of_two_that_accuse_each_other_one_is_replaced():
    cluster = Cluster()
    cluster.waits = {(HOME, OTHER_HOME): 0.0, (OTHER_HOME, HOME): 0.0}
    assert [(loss.rank, loss.kind) for loss in cluster.pass_time(100)] == [(OTHER_HOME, "cut")]


def test_who_waits_for_the_dead_accuses_nobody():
    cluster = Cluster()
    cluster.waits[HOME, OWNER] = 0.0
    cluster.quiet.add(OWNER)
    assert [(loss.rank, loss.kind) for loss in cluster.pass_time(100)] == [(OWNER, "silent")]


@pytest.mark.parametrize(
    ("num_homes", "num_owners", "num_missing", "degrades", "can"),
    [
        (1, 1, 0, False, True),
        (0, 1, 0, False, False),
        (1, 1, 3, False, False),
        (1, 1, 3, True, True),
        (1, 0, 8, True, False),
        (0, 1, 3, True, False),
    ],
)
def test_what_can_be_served(num_homes, num_owners, num_missing, degrades, can):
    assert can_serve(num_homes, num_owners, num_missing, degrades=degrades) is can


@given(st.lists(st.floats(0, 100), max_size=30), st.floats(0.1, 5), st.floats(5, 60))
def test_pauses_are_bounded_and_grow_with_short_lives(lives, backoff_s, max_backoff_s):
    crashes = Crashes(backoff_s=backoff_s, max_backoff_s=max_backoff_s)
    assert crashes.pause_s == 0
    for lived_s in lives:
        before, crashes = crashes, crashes.after(lived_s)
        assert 0 <= crashes.pause_s <= max_backoff_s
        if lived_s >= max_backoff_s:
            assert (crashes.count, crashes.pause_s) == (1, 0)
        else:
            assert crashes.count == before.count + 1
            assert crashes.pause_s >= before.pause_s
    assert crashes.forgiven().pause_s == 0


def test_pauses_double():
    crashes, pauses = Crashes(backoff_s=0.5, max_backoff_s=30.0), []
    for _ in range(9):
        crashes = crashes.after(0.0)
        pauses.append(crashes.pause_s)
    assert pauses == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


@pytest.mark.parametrize("stranger", [7, -1])
def test_strangers_are_ignored(stranger):
    signs = LifeSigns(TIMEOUT_S)
    signs.beat(stranger, 0.0)
    signs.pulse(stranger, StepTime(9.0, 0.0))
    signs.accuse(stranger, 0, 9.0)
    signs.forget(stranger)
    signs.advance(100.0)
    assert signs.losses(set(), set(), lambda _: False) == []

"""The order of waves, and the hold that keeps them apart: on a small model, explored exhaustively, nobody is stuck."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoe.policy.wave_order import WaveOrder

NUM_PASSES = 3  # passes are counted modulo this: homes are never further apart than one


@st.composite
def orders(draw):
    return WaveOrder(2 * draw(st.integers(1, 60)) + 1, draw(st.integers(1, 8)))


@given(orders(), st.data())
def test_any_attention_runs_before_any_experts(order, data):
    attention, experts = (
        order.key(
            is_experts,
            data.draw(st.integers(0, order.num_stages - 1)),
            data.draw(st.integers(0, order.num_waves - 1)),
            data.draw(st.integers(0, 9)),
        )
        for is_experts in (False, True)
    )
    assert attention < experts


@given(orders(), st.booleans(), st.data())
def test_within_a_kind_progress_counts_and_later_waves_follow_behind(order, is_experts, data):
    stage = data.draw(st.integers(0, order.num_stages - 1))
    num_passes = data.draw(st.integers(0, 9))
    keys = [order.key(is_experts, stage, wave, num_passes) for wave in range(order.num_waves)]
    assert sorted(keys) == keys, "in integers, so that small models may have equal ones"
    wave = data.draw(st.integers(0, order.num_waves - 1))
    assert order.key(is_experts, stage, wave, num_passes + 1) > keys[-1]  # nobody is overtaken by a whole pass
    if stage:
        assert order.key(is_experts, stage - 1, wave, num_passes) < keys[wave]


def test_waves_are_three_quarters_of_an_even_spread_behind_each_other():
    order = WaveOrder(65, 4)
    delta = 0.75 * 65 / 4
    for wave in (1, 2, 3):
        behind = order.key(False, 20, wave, 1)
        assert order.key(False, int(20 + wave * delta), 0, 1) <= behind < order.key(False, int(21 + wave * delta), 0, 1)


def test_without_attention_first_progress_alone_counts():
    order = WaveOrder(9, 2, attention_first=False)
    assert order.key(True, 1, 0, 0) < order.key(False, 2, 0, 0)


@given(orders(), st.lists(st.integers(0, 120), max_size=7))
def test_a_wave_is_held_while_another_is_less_than_half_of_an_even_spread_ahead(order, stages):
    stages = [stage % order.num_stages for stage in stages]
    close = any(2 * order.num_waves * stage < order.num_stages for stage in stages)
    assert order.must_hold(stages) == (close and order.num_waves > 1)


@given(orders())
def test_a_hold_ends_before_the_wave_ahead_is_at_its_end(order):
    """A home sees a wave move when it has run attention: the last is stage S - 3, and then come experts, S - 2."""
    assert not order.must_hold([order.num_stages - 2])


class Homes:
    """Homes that each run waves through L layers; a state is a tuple of [home][wave] (pass, place).

    Places are 0: at the border; otherwise the stage that comes next, plus one. The experts of a wave's layer run when
    all homes have brought their share; everything else may happen at any time, in any order.
    """

    def __init__(self, num_homes: int, num_waves: int, num_layers: int, *, invited: bool) -> None:
        self._num_homes, self._num_waves, self._head = num_homes, num_waves, 2 * num_layers + 1
        self._order = WaveOrder(2 * num_layers + 1, num_waves)
        self._invited = invited
        self.start = (((0, 0),) * num_waves,) * num_homes

    def after(self, state):
        """States that may follow."""
        for home, wave in itertools.product(range(self._num_homes), range(self._num_waves)):
            num_passes, place = state[home][wave]
            if place == 0:
                if not self._is_held(state, home, wave):
                    yield self._moved(state, {home: (num_passes, 1)}, wave)
            elif place == self._head:
                yield self._moved(state, {home: ((num_passes + 1) % NUM_PASSES, 0)}, wave)
            elif place % 2:
                yield self._moved(state, {home: (num_passes, place + 1)}, wave)
            elif home == 0 and all(other[wave] == (num_passes, place) for other in state):
                yield self._moved(state, dict.fromkeys(range(self._num_homes), (num_passes, place + 1)), wave)

    def _is_held(self, state, home: int, wave: int) -> bool:
        mine = state[home][wave][0]
        for num_passes, place in (other[wave] for other in state):
            if self._invited and ((num_passes == mine and place > 0) or num_passes == (mine + 1) % NUM_PASSES):
                return False
        return self._order.must_hold([self._stage(place) for _, place in state[home] if place])

    @staticmethod
    def _stage(place: int) -> int:
        """As a home knows it: 0 at first, then the experts of the last attention that it has run."""
        return 0 if place == 1 else place // 2 * 2 - 1

    @staticmethod
    def _moved(state, places, wave: int):
        return tuple(
            tuple(places[home] if home in places and index == wave else at for index, at in enumerate(waves))
            for home, waves in enumerate(state)
        )

    def stuck(self):
        """Reachable states after which nothing can happen."""
        seen, todo, dead = {self.start}, [self.start], []
        while todo:
            state = todo.pop()
            following = list(self.after(state))
            if not following:
                dead.append(state)
            fresh = set(following) - seen
            seen |= fresh
            todo += fresh
        assert len(seen) > 50
        return dead


@pytest.mark.parametrize(("num_homes", "num_waves", "num_layers"), [(2, 2, 4), (3, 2, 2), (2, 3, 1)])
def test_invited_homes_never_wait_for_each_other(num_homes, num_waves, num_layers):
    assert not Homes(num_homes, num_waves, num_layers, invited=True).stuck()


def test_homes_that_hold_what_others_have_started_can_wait_for_each_other_for_ever():
    """Why there are invitations: each of two homes has started the wave that the other one holds."""
    dead = Homes(2, 2, 3, invited=False).stuck()
    assert any({place for _, place in waves} == {0, 2} for state in dead for waves in state)

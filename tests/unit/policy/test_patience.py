"""Whether a step hangs, and periods that fit into any timeout."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoe.policy.patience import FIRST_STEP_S, STALL_TIMEOUT_S, USUAL_TIMES, Patience, StepTime

timeouts = st.floats(0.2, 1e4)
seconds = st.floats(0.0, 1e4)


@given(timeouts)
def test_all_of_it_fits_into_the_timeout(timeout_s):
    """The arithmetic of the module's docstring, with a look's time left over for messages."""
    patience = Patience(timeout_s)
    sign_s, look_s = patience.sign_s, patience.look_s
    most = timeout_s - look_s + 1e-9
    assert patience.silence_s + look_s <= most
    assert 2 * sign_s + patience.free_s + sign_s + look_s <= most
    assert patience.answer_s + sign_s + look_s <= most
    assert patience.named_s + 3 * sign_s <= patience.answer_s + 1e-9, "two signs and a report before the accusation"
    assert patience.silence_s - 2 * sign_s - look_s >= 0.59 * timeout_s, "what signs may be late by"
    assert patience.free_s >= 0.5 * timeout_s


@given(timeouts, seconds, seconds, st.floats(0.0, 100.0))
def test_a_known_step_hangs_when_nothing_has_kept_it_for_long(timeout_s, step_s, free_s, longest_s):
    patience, free_s = Patience(timeout_s), min(step_s, free_s)
    hangs = patience.is_hung(StepTime(step_s, longest_s, free_s, longest_s))
    if free_s >= timeout_s and free_s >= USUAL_TIMES * longest_s:
        assert hangs
    if hangs:
        assert step_s >= 0.5 * timeout_s
        assert step_s >= USUAL_TIMES * longest_s


@given(timeouts, seconds, st.floats(0.0, 100.0))
def test_a_step_that_was_kept_or_is_not_known_has_more_time(timeout_s, step_s, usual_s):
    patience = Patience(timeout_s)
    limit_s = max(STALL_TIMEOUT_S, timeout_s, USUAL_TIMES * usual_s)
    assert patience.is_hung(StepTime(step_s, usual_s)) == (step_s >= limit_s)
    assert patience.is_hung(StepTime(step_s, usual_s, free_s=step_s)) == (step_s >= limit_s)
    assert patience.is_hung(StepTime(step_s, usual_s, free_s=0.0, longest_s=usual_s or 0.1)) == (step_s >= limit_s)


def test_the_first_step_of_a_kind_may_compile():
    patience = Patience(2.0)
    assert not patience.is_hung(StepTime(FIRST_STEP_S - 1, None, FIRST_STEP_S - 1))
    assert patience.is_hung(StepTime(FIRST_STEP_S, None))


@pytest.mark.parametrize(("timeout_s", "sign_s", "look_s"), [(2.0, 0.25, 0.1), (0.2, 0.025, 0.01), (60.0, 0.5, 0.1)])
def test_periods(timeout_s, sign_s, look_s):
    patience = Patience(timeout_s)
    assert (patience.sign_s, patience.look_s) == pytest.approx((sign_s, look_s))

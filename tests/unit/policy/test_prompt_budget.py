"""Who decodes waits a quarter of a second for prompts; a crowd of prompts waits for nobody."""

from __future__ import annotations

import pytest

from amoe.policy.prompt_budget import CROWD, FIRST_BOUND, LEAST_BOUND, STEP_S, learn_token_s, prompt_budget

MOST = 2048


def test_nobody_is_kept_waiting_where_nobody_decodes():
    assert prompt_budget(MOST, 0, 1, token_s=1.0) == MOST


@pytest.mark.parametrize(
    ("token_s", "tokens"),
    [(None, FIRST_BOUND), (0.0, FIRST_BOUND), (STEP_S / 700, 700), (1e-6, MOST), (10.0, LEAST_BOUND)],
)
def test_a_step_with_decodes_takes_what_it_gets_through_in_its_time(token_s: float | None, tokens: int):
    assert prompt_budget(MOST, 3, 1, token_s) == pytest.approx(tokens, abs=1)
    assert prompt_budget(100, 3, 1, token_s) == 100


def test_a_crowd_goes_first_unless_more_decode():
    assert prompt_budget(MOST, 1, CROWD - 1, None) == FIRST_BOUND
    assert prompt_budget(MOST, 1, CROWD, None) == MOST
    assert prompt_budget(MOST, 32, 32, None) == MOST
    assert prompt_budget(MOST, 100, 49, None) == FIRST_BOUND
    assert prompt_budget(MOST, 100, 50, None) == MOST


@pytest.mark.parametrize("fixed_s", [0.0, 0.05, 0.2])
@pytest.mark.parametrize("each_s", [0.0002, 0.0005, 0.0015])
@pytest.mark.parametrize("first", [None, 1e-5, 0.1])
def test_steps_come_to_take_their_time(fixed_s: float, each_s: float, first: float | None):
    """Whatever they cost besides, unless there must be more of them."""
    token_s = first
    for _ in range(200):
        count = prompt_budget(MOST, 1, 1, token_s)
        token_s = learn_token_s(token_s, MOST, count, fixed_s + each_s * count)
    expected = min(MOST, max(LEAST_BOUND, (STEP_S - fixed_s) / each_s))
    assert prompt_budget(MOST, 1, 1, token_s) == pytest.approx(expected, rel=0.05)


def test_a_short_prompt_teaches_nothing():
    assert learn_token_s(None, MOST, 20, 0.1) is None
    assert learn_token_s(0.001, MOST, 20, 0.1) == 0.001

"""Who gets a request, and who is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoe.errors import RequestError
from amoe.policy import admission
from amoe.policy.admission import (
    MAX_RETRY_AFTER_S,
    WorkerLoad,
    choose_worker,
    fitting_max_tokens,
    queue_capacity,
    retry_after_s,
    validate_length,
    validate_prompt,
)


def test_fewest_requests_then_fewest_tokens_then_lowest_rank():
    assert choose_worker([WorkerLoad(0, 2, 1), WorkerLoad(1, 1, 999)]) == 1
    assert choose_worker([WorkerLoad(0, 1, 10), WorkerLoad(1, 1, 9)]) == 1
    assert choose_worker([WorkerLoad(0, 1, 9), WorkerLoad(1, 1, 9)]) == 0


def test_requests_follow_the_shares():
    shares, counts = (0.5, 0.3, 0.2), [0, 0, 0]
    for _ in range(100):
        loads = [WorkerLoad(rank, counts[rank], 0, share) for rank, share in enumerate(shares)]
        counts[choose_worker(loads)] += 1
    assert counts == [50, 30, 20]


def test_nobody_waits_where_another_worker_has_room():
    loads = [WorkerLoad(0, 8, 1, 0.9), WorkerLoad(1, 7, 1, 0.1)]
    assert choose_worker(loads, 8) == 1
    assert choose_worker(loads, 7) == 0, "none has room"


def test_queue_capacity():
    assert queue_capacity(3, 256, 10) == 778


@given(excess=st.integers(1, 10_000), rate=st.floats(0, 1e6))
def test_retry_after_is_a_sane_hint(excess, rate):
    assert 1 <= retry_after_s(excess, rate) <= MAX_RETRY_AFTER_S


def test_retry_after_follows_the_rate():
    assert retry_after_s(10, 2.0) == 5


@given(num_prompt=st.integers(1, 100), max_tokens=st.integers(1, 100))
def test_what_fits_is_admitted(num_prompt, max_tokens):
    if num_prompt + max_tokens <= 64:
        validate_length(num_prompt, max_tokens, 64, "prompt")
        assert fitting_max_tokens(num_prompt, 64, "prompt") >= max_tokens
    else:
        with pytest.raises(RequestError):
            validate_length(num_prompt, max_tokens, 64, "prompt")


def test_prompts():
    validate_prompt([0, 9], 10, "prompt")
    for wrong in ([], [10], [0, -1]):
        with pytest.raises(RequestError) as caught:
            validate_prompt(wrong, 10, "messages")
        assert caught.value.param == "messages"


def test_place_in_line():
    assert admission.place_in_line("fcfs", -3, 2) > admission.place_in_line("fcfs", 7, 1)
    assert admission.place_in_line("priority", -3, 2) < admission.place_in_line("priority", 7, 1)
    assert admission.place_in_line("priority", 7, 1) < admission.place_in_line("priority", 7, 2)


def test_a_priority_that_would_be_ignored_is_refused():
    admission.validate_priority(0, "fcfs")
    admission.validate_priority(-7, "priority")
    with pytest.raises(RequestError, match=r"priority is 1, .*--scheduling-policy priority") as caught:
        admission.validate_priority(1, "fcfs")
    assert caught.value.param == "priority"

"""Continuous batching: admission in order, chunks within the budget, preemption from the back, abort in every phase."""

from __future__ import annotations

import numpy as np
import pytest

from amoe.config import CacheConfig, SchedulerConfig
from amoe.core.batcher import Batcher
from amoe.core.sequence import SequenceStatus
from amoe.types import SamplingParams

PARAMS = SamplingParams(max_tokens=32)
SCORED = SamplingParams(max_tokens=32, prompt_logprobs=0)


def make(*, rows=4, budget=16, blocks=8, block_size=4, caching=False):
    scheduler = SchedulerConfig(max_num_seqs=rows, max_num_batched_tokens=budget)
    return Batcher(scheduler, CacheConfig(block_size=block_size, enable_prefix_caching=caching), blocks, 64, 1)


def add(batcher, request_id, length, first=0, params=PARAMS):
    return batcher.add(request_id, np.arange(first, first + length, dtype=np.int32), params)


def finish_chunks(batcher, entry):
    """The model has run on the chunks of an entry."""
    for chunk in entry.chunks:
        batcher.finish_chunk(int(chunk[-1]))


def sample(batcher, *sequences, token=7, finished=False):
    """The head has run on these sequences."""
    slots = np.asarray([sequence.slots[0] for sequence in sequences], np.int32)
    batcher.extend(slots, np.full(len(slots), token), np.full(len(slots), finished))


def prefilled(batcher, sequence):
    """Bring a sequence behind its first sampled token."""
    while sequence.status is not SequenceStatus.DECODE:
        finish_chunks(batcher, batcher.start())
    sample(batcher, sequence)


def assert_empty(batcher):
    batcher.blocks.check()
    assert batcher.blocks.num_used == 0
    assert batcher.slots.num_free == batcher.slots.num_slots
    assert batcher.table.num_free_rows == len(batcher.table.sequences)
    assert not batcher.running
    assert not batcher.waiting
    assert not batcher.members
    assert batcher.start().num_tokens == 0


def positions(batcher, slots):
    return batcher.tokens.position[slots].tolist()


def test_a_prompt_goes_in_chunks_one_at_a_time_and_only_its_last_token_is_sampled():
    batcher = make(budget=4)
    sequence = add(batcher, 1, 10)
    seen = []
    for _ in range(3):
        entry = batcher.start()
        assert len(entry.chunks) == 1
        assert batcher.start().num_tokens == 0, "one chunk of a sequence at a time"
        chunk = entry.chunks[0]
        seen += positions(batcher, chunk)
        assert batcher.tokens.wants_logits[chunk].tolist() == [p == 9 for p in positions(batcher, chunk)]
        finish_chunks(batcher, entry)
    assert seen == list(range(10))
    assert sequence.status is SequenceStatus.DECODE
    assert batcher.slots.num_free == batcher.slots.num_slots - 1
    sample(batcher, sequence)
    assert positions(batcher, batcher.start().decodes) == [10]


def test_the_budget_bounds_prompt_tokens_in_flight_over_all_sequences():
    batcher = make(budget=6)
    first, second = add(batcher, 1, 4), add(batcher, 2, 4)
    entry = batcher.start()
    assert [len(chunk) for chunk in entry.chunks] == [4, 2]
    assert batcher.start().num_tokens == 0
    finish_chunks(batcher, entry)
    assert first.status is SequenceStatus.DECODE
    assert [len(chunk) for chunk in batcher.start().chunks] == [2]
    assert second.status is SequenceStatus.PREFILL


def test_admission_is_in_order_of_arrival_even_if_a_later_one_would_fit():
    batcher = make(blocks=4, rows=4)
    add(batcher, 1, 8)
    big, small = add(batcher, 2, 12), add(batcher, 3, 1)
    batcher.start()
    assert [s.request_id for s in batcher.running.values()] == [1]
    assert list(batcher.waiting) == [big, small]


def test_no_more_sequences_than_rows():
    batcher = make(rows=2)
    for request_id in range(3):
        add(batcher, request_id, 1)
    batcher.start()
    assert len(batcher.running) == 2
    batcher.abort(0)
    batcher.start()
    assert sorted(batcher.running) == [1, 2]


def test_the_latest_is_preempted_and_comes_back_with_all_its_tokens():
    batcher = make(blocks=3, block_size=2)
    first, second = add(batcher, 1, 2), add(batcher, 2, 2, first=50)
    prefilled(batcher, first)
    prefilled(batcher, second)
    entry = batcher.start()  # both need a second block, and there is one
    assert batcher.num_preemptions == 1
    assert second.status is SequenceStatus.WAITING
    assert second.token_ids.tolist() == [50, 51, 7]
    assert second.prompt_len == 2
    assert len(entry.decodes) == 1
    assert batcher.start().num_tokens == 0, "there is no room for it yet"
    sample(batcher, first, finished=True)
    entry = batcher.start()
    assert positions(batcher, entry.chunks[0]) == [0, 1, 2]
    finish_chunks(batcher, entry)
    sample(batcher, second, finished=True)
    assert_empty(batcher)


def test_whoever_is_preempted_first_comes_back_last():
    batcher = make(blocks=4, block_size=2, rows=4)
    sequences = [add(batcher, request_id, 2) for request_id in range(4)]
    for sequence in sequences:
        while sequence.status is not SequenceStatus.DECODE:
            finish_chunks(batcher, batcher.start())
    sample(batcher, *sequences)
    entry = batcher.start()
    assert len(entry.decodes) == 2
    assert [s.request_id for s in batcher.waiting] == [2, 3]
    add(batcher, 9, 1)
    assert [s.request_id for s in batcher.waiting] == [2, 3, 9]


def test_a_prompt_in_flight_is_preempted_for_an_earlier_sequence():
    batcher = make(blocks=3, block_size=2)
    first, second = add(batcher, 1, 2), add(batcher, 2, 4)
    entry = batcher.start()
    batcher.finish_chunk(int(entry.chunks[0][-1]))
    sample(batcher, first)
    assert len(second.slots) == 4, "its chunk is in flight"
    assert len(batcher.start().decodes) == 1
    assert second.status is SequenceStatus.WAITING
    assert batcher._prefill_in_flight == 0
    assert second.token_ids.tolist() == [0, 1, 2, 3]
    sample(batcher, first, finished=True)
    batcher.start()
    assert second.status is SequenceStatus.PREFILL


def abort_while(phase, batcher, sequence):
    """Bring the sequence into a phase."""
    if phase == "waiting":
        return
    entry = batcher.start()
    if phase == "chunk in flight":
        return
    finish_chunks(batcher, entry)
    if phase == "between chunks":
        return
    finish_chunks(batcher, batcher.start())
    if phase == "on its way to the head":
        return
    sample(batcher, sequence)
    if phase == "decode due":
        return
    batcher.start()


@pytest.mark.parametrize(
    "phase",
    ["waiting", "chunk in flight", "between chunks", "on its way to the head", "decode due", "decode in flight"],
)
@pytest.mark.parametrize("caching", [False, True])
def test_abort_frees_everything_at_any_stage(phase, caching):
    batcher = make(budget=4, caching=caching)
    sequence = add(batcher, 1, 8)
    abort_while(phase, batcher, sequence)
    assert batcher.abort(1) is sequence
    assert sequence.status is SequenceStatus.FINISHED
    assert batcher.abort(1) is None, "there is one end"
    assert_empty(batcher)


def test_a_shared_prefix_is_computed_once_and_outlives_the_one_who_computed_it():
    batcher = make(caching=True, budget=32)
    first = add(batcher, 1, 9)
    prefilled(batcher, first)
    second = add(batcher, 2, 9)
    entry = batcher.start()
    assert second.num_cached_tokens == 8
    assert positions(batcher, entry.chunks[0]) == [8]
    assert second.blocks[:2] == first.blocks[:2]
    batcher.abort(1)
    third = add(batcher, 3, 9)
    batcher.start()
    assert third.blocks[:2] == second.blocks[:2]
    assert third.blocks[2] != second.blocks[2]
    assert (batcher.blocks.num_queries, batcher.blocks.num_hits) == (27, 16)


def test_cached_tokens_are_those_of_the_first_admission():
    batcher = make(blocks=3, block_size=2, caching=True)
    first, second = add(batcher, 1, 2), add(batcher, 2, 2, first=50)
    prefilled(batcher, first)
    prefilled(batcher, second)
    batcher.start()
    assert second.status is SequenceStatus.WAITING
    sample(batcher, first, finished=True)
    entry = batcher.start()
    assert positions(batcher, entry.chunks[0]) == [2], "its own first block was still there"
    assert second.num_cached_tokens == 0


def test_an_unknown_request_is_not_aborted():
    assert make().abort(5) is None


def test_whoever_was_left_out_of_a_micro_batch_goes_first_the_next_time():
    batcher = make(rows=3, budget=3)
    sequences = [add(batcher, request_id, 1) for request_id in range(3)]
    finish_chunks(batcher, batcher.start())
    sample(batcher, *sequences)
    started = []
    for _ in range(6):
        (slot,) = batcher.start(max_decodes=1).decodes
        (sequence,) = (s for s in sequences if s.slots[0] == slot)
        started.append(sequence.request_id)
        sample(batcher, sequence)
    assert sorted(started[:3]) == sorted(started[3:]) == [0, 1, 2]


def test_a_refused_prompt_is_looked_up_again_only_when_something_has_changed(monkeypatch):
    batcher = make(blocks=4, rows=4, budget=32, caching=True)
    first = add(batcher, 1, 9)
    entry = batcher.start()
    second = add(batcher, 2, 12)
    lookups = []
    match_prefix = batcher.blocks.match_prefix
    monkeypatch.setattr(
        batcher.blocks, "match_prefix", lambda ids, root: lookups.append(len(ids)) or match_prefix(ids, root)
    )
    for _ in range(3):
        assert batcher.start().num_tokens == 0
    assert lookups == [12]
    finish_chunks(batcher, entry)  # commits two blocks of a prefix that both have
    assert positions(batcher, batcher.start().chunks[0]) == [8, 9, 10, 11]
    assert second.blocks[:2] == first.blocks[:2]


def test_a_home_that_was_idle_takes_no_precedence_for_long():
    batcher = make()
    add(batcher, 0, 3)
    (chunk,) = batcher.start().chunks
    batcher.finish_chunk(int(chunk[-1]))
    batcher.see_iteration(1000)  # another home is there
    slots = chunk[-1:]
    batcher.extend(slots, np.array([7]), np.array([False]))
    batcher.start()
    assert batcher.tokens.iteration[slots[0]] >= 999
    add(batcher, 1, 2)
    (newcomer,) = batcher.start().chunks
    assert batcher.tokens.iteration[newcomer[0]] == 1001


def test_iterations_advance_by_one_where_nobody_is_ahead():
    batcher = make()
    add(batcher, 0, 3)
    (chunk,) = batcher.start().chunks
    batcher.finish_chunk(int(chunk[-1]))
    slots = chunk[-1:]
    before = int(batcher.tokens.iteration[slots[0]])
    for step in range(1, 4):
        batcher.extend(slots, np.array([7]), np.array([False]))
        batcher.start()
        assert batcher.tokens.iteration[slots[0]] == before + step


def score(batcher, entry):
    """The head has seen the chunks of an entry. Returns the positions whose successors it was asked about."""
    seen = []
    for chunk in entry.chunks:
        scored = chunk[batcher.tokens.is_scored[chunk]]
        seen += positions(batcher, scored)
        batcher.finish_scoring(scored)
    return seen


def test_a_scored_prompt_holds_its_chunks_until_the_head_has_seen_them():
    batcher = make(budget=4)
    sequence = add(batcher, 1, 10, params=SCORED)
    seen = []
    for _ in range(3):
        entry = batcher.start()
        finish_chunks(batcher, entry)
        assert sequence.status is SequenceStatus.PREFILL
        assert batcher.start().num_tokens == 0, "its slots are in use"
        seen += score(batcher, entry)
    assert seen == list(range(9)), "what follows the last token is sampled"
    assert sequence.status is SequenceStatus.DECODE
    sample(batcher, sequence)
    assert positions(batcher, batcher.start().decodes) == [10]


def test_a_scored_prompt_does_not_use_the_prefix_cache_but_fills_it():
    batcher = make(caching=True, budget=32)
    for request_id in range(2):
        sequence = add(batcher, request_id, 9, params=SCORED)
        entry = batcher.start()
        assert positions(batcher, entry.chunks[0]) == list(range(9))
        finish_chunks(batcher, entry)
        score(batcher, entry)
        sample(batcher, sequence)
        assert sequence.num_cached_tokens == 0
    assert batcher.blocks.num_queries == 0
    add(batcher, 2, 9)
    assert positions(batcher, batcher.start().chunks[0]) == [8]


def test_what_has_been_scored_is_not_scored_again_after_a_preemption():
    batcher = make(budget=4, blocks=8, caching=True)
    sequence = add(batcher, 1, 10, params=SCORED)
    seen = []
    for _ in range(2):
        entry = batcher.start()
        finish_chunks(batcher, entry)
        seen += score(batcher, entry)
    batcher._preempt(sequence)
    while sequence.status is not SequenceStatus.DECODE:
        entry = batcher.start()
        finish_chunks(batcher, entry)
        seen += score(batcher, entry)
    assert seen == list(range(9))
    sample(batcher, sequence)
    batcher._preempt(sequence)
    entry = batcher.start()
    assert positions(batcher, entry.chunks[0]) == [8, 9, 10], "and all can be taken from the cache"
    assert score(batcher, entry) == []


def test_a_scored_prompt_is_aborted_while_it_waits_for_the_head():
    batcher = make(budget=4)
    add(batcher, 1, 10, params=SCORED)
    finish_chunks(batcher, batcher.start())
    batcher.abort(1)
    assert_empty(batcher)


def test_of_a_chunk_that_was_scored_in_part_only_the_rest_goes_to_the_head():
    batcher = make(budget=6)
    other, sequence = add(batcher, 1, 2), add(batcher, 2, 10, params=SCORED)
    entry = batcher.start()
    assert [len(chunk) for chunk in entry.chunks] == [2, 4]
    finish_chunks(batcher, entry)
    scored = entry.chunks[1]
    assert positions(batcher, scored) == [0, 1, 2, 3]
    batcher.finish_scoring(scored)
    batcher._preempt(sequence)
    sample(batcher, other, finished=True)
    (chunk,) = batcher.start().chunks
    assert positions(batcher, chunk) == [0, 1, 2, 3, 4, 5]
    batcher.finish_chunk(int(chunk[-1]))
    assert positions(batcher, batcher.members[int(chunk[-1])]) == positions(batcher, sequence.slots) == [4, 5]
    assert batcher._prefill_in_flight == 2
    assert batcher.slots.num_free == batcher.slots.num_slots - 2
    batcher.finish_scoring(sequence.slots)
    assert [positions(batcher, chunk) for chunk in batcher.start().chunks] == [[6, 7, 8, 9]]
    batcher.abort(2)
    assert_empty(batcher)


def test_a_sibling_waits_for_the_prompt_and_nobody_waits_for_it():
    batcher = make(budget=4, blocks=20)
    first = add(batcher, 1, 9)
    sibling = batcher.add(2, np.arange(9, dtype=np.int32), PARAMS, 1)
    assert batcher.num_ready == 1
    stranger = add(batcher, 3, 3, first=50)
    finish_chunks(batcher, batcher.start())
    finish_chunks(batcher, batcher.start())
    assert sibling.row < 0
    entry = batcher.start()  # the last token of the first one, and the stranger's prompt
    assert [len(chunk) for chunk in entry.chunks] == [1, 3]
    finish_chunks(batcher, entry)
    entry = batcher.start()
    assert positions(batcher, entry.chunks[0]) == [8]
    assert sibling.blocks[:2] == first.blocks[:2]
    assert sibling.num_cached_tokens == 8
    assert batcher.blocks.num_queries == 0, "there is no prefix cache"
    for request_id in (first.request_id, sibling.request_id, stranger.request_id):
        batcher.abort(request_id)
    assert_empty(batcher)


def test_a_sibling_of_somebody_who_has_long_begun_finds_its_blocks():
    batcher = make(budget=16, blocks=20)
    first = add(batcher, 1, 9)
    prefilled(batcher, first)
    late = batcher.add(2, np.arange(9, dtype=np.int32), PARAMS, 1)
    assert positions(batcher, batcher.start().chunks[0]) == [8]
    assert late.blocks[:2] == first.blocks[:2]


def test_short_prompts_have_nothing_to_share():
    batcher = make(budget=16)
    add(batcher, 1, 4)
    batcher.add(2, np.arange(4, dtype=np.int32), PARAMS, 1)
    assert [len(chunk) for chunk in batcher.start().chunks] == [4, 4]


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_priority_decides_who_is_admitted_and_who_is_preempted(policy):
    scheduler = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16, scheduling_policy=policy)
    batcher = Batcher(scheduler, CacheConfig(block_size=2), 3, 64, 1)
    worse = add(batcher, 1, 2, params=SamplingParams(max_tokens=9, priority=5))
    prefilled(batcher, worse)
    usual = add(batcher, 2, 2, first=40)
    better = add(batcher, 3, 2, first=50, params=SamplingParams(max_tokens=9, priority=-1))
    assert list(batcher.waiting) == ([better, usual] if policy == "priority" else [usual, better])
    entry = batcher.start()  # the first one grows: one block is left
    admitted = better if policy == "priority" else usual
    assert set(batcher.running) == {1, admitted.request_id}
    finish_chunks(batcher, entry)
    sample(batcher, worse, admitted)
    batcher.start()  # the other one grows
    assert worse.status is (SequenceStatus.WAITING if policy == "priority" else SequenceStatus.DECODE)
    assert (worse.life.num_preemptions, admitted.life.num_preemptions) == ((1, 0) if policy == "priority" else (0, 1))


def test_the_first_admission_is_when_a_sequence_began():
    batcher = make(blocks=4, block_size=2)
    sequence = add(batcher, 1, 4)
    batcher.start(3.5)
    batcher._preempt(sequence)
    batcher.start(7.0)
    assert sequence.life.admitted_at == 3.5

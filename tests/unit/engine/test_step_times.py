"""What is known of steps: on average, and at most."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from amoe.core.steps import ChunkSpan, ForwardStep, HeadStep, PromptTokens
from amoe.engine.step_times import COLD_STEPS, WELL_KNOWN_STEPS, StepTimes
from amoe.types import BlockId, BlockKind


def experts_step(num_tokens: int) -> Any:
    return SimpleNamespace(block=BlockId(BlockKind.EXPERTS, 0), num_tokens=num_tokens)


def forward_step(num_tokens: int, chunk_at: int | None = None) -> ForwardStep:
    """Single tokens, or a chunk of a prompt that begins at a position."""
    slots, positions = np.zeros(num_tokens, np.int32), np.zeros(num_tokens, np.int32)
    if chunk_at is None:
        return ForwardStep(slots, slots, positions, num_tokens)
    positions += chunk_at + np.arange(num_tokens, dtype=np.int32)
    return ForwardStep(slots, slots, positions, 0, [ChunkSpan(0, num_tokens, 0)])


def test_a_forward_step_is_as_usual_as_those_of_its_size():
    times = StepTimes()
    for _ in range(5):
        times.observe(forward_step(1), 0.01)
    assert times.usual_s(forward_step(1)) == pytest.approx(0.01)
    assert times.usual_s(forward_step(2048)) is None  # a thousand times a decode step would be no limit at all
    times.observe(forward_step(1024), 0.5)
    assert times.usual_s(forward_step(2000)) == pytest.approx(0.5 * 2000 / 1024)


def test_what_is_usual_is_told_of_a_layer():
    """A hang within a long step is noticed long before ten such steps would be over."""
    times = StepTimes(48)
    times.observe(forward_step(2048), 192.0)
    times.observe(experts_step(8), 1.0)
    assert times.usual_s(forward_step(2048)) == pytest.approx(4.0)
    assert times.usual_s(experts_step(8)) == pytest.approx(1.0)


KNOWN = COLD_STEPS + WELL_KNOWN_STEPS


def test_the_longest_step_of_a_size_is_known_after_many():
    times = StepTimes(4)
    for number in range(KNOWN):
        assert times.longest_s(experts_step(9)) is None
        assert times.longest_s(forward_step(9)) is None
        cold = number < COLD_STEPS
        times.observe(experts_step(8 + number % 8), 0.01 * (1 + (number == COLD_STEPS + 3)) + cold)
        times.observe(forward_step(8), 0.04)
    assert times.longest_s(experts_step(9)) == pytest.approx(0.02)
    assert times.longest_s(forward_step(9)) == pytest.approx(0.01)  # of one of its layers
    assert times.longest_s(experts_step(16)) is None
    assert times.longest_s(forward_step(7)) is None


def test_one_long_step_is_not_remembered_for_ever():
    times = StepTimes()
    for number in range(2000):
        times.observe(experts_step(8), 5.0 if number == 1000 else 0.01)
        if number >= KNOWN:
            longest_s = times.longest_s(experts_step(8))
            assert longest_s == (5.0 if 1000 <= number < 1000 + 150 else 0.01) or 1150 <= number < 1600
    assert times.longest_s(experts_step(8)) == 0.01


def test_a_head_is_one_part_of_a_step_and_scoring_prompts_is_never_well_known():
    """It may take as long as all layers together."""
    times, block = StepTimes(4), BlockId(BlockKind.HEAD, 4)
    slots = np.zeros(8, np.int32)
    plain, scoring = HeadStep(block, slots, slots), HeadStep(block, slots, slots, PromptTokens(slots, slots, slots))
    for _ in range(KNOWN):
        times.observe(forward_step(8), 0.04)
        times.observe(plain, 0.01)
        times.observe(scoring, 0.01)
    assert times.longest_s(replace(forward_step(8), head=plain)) == pytest.approx(0.04)
    assert times.longest_s(replace(forward_step(8), head=scoring)) is None
    assert times.longest_s(plain) == pytest.approx(0.01)
    assert times.longest_s(scoring) is None


def test_a_chunk_behind_a_long_prefix_is_of_another_size():
    """It attends to a thousand times as much, and nothing need have led up to that: the prefix may have been cached."""
    times = StepTimes()
    for _ in range(KNOWN):
        times.observe(forward_step(32, chunk_at=0), 0.01)
    assert times.longest_s(forward_step(32, chunk_at=0)) == pytest.approx(0.01)
    assert times.longest_s(forward_step(32, chunk_at=100_000)) is None


def test_nothing_is_well_known_where_any_step_may_compile():
    times = StepTimes(may_compile=True)
    for _ in range(2 * KNOWN):
        times.observe(experts_step(8), 0.01)
    assert times.longest_s(experts_step(8)) is None
    assert times.usual_s(experts_step(8)) == pytest.approx(0.01)

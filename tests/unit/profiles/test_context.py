"""The context that a step of attention pays for."""

from __future__ import annotations

import numpy as np
import pytest

from amoe.core.steps import AttentionStep, ChunkSpan
from amoe.profiles.context import ContextCounter
from amoe.profiles.devices import DEVICES
from amoe.profiles.models import MODELS
from amoe.types import BlockId, BlockKind

MIXTRAL, H100 = MODELS["mixtral-8x7b"], DEVICES["h100"]


def step_of(decodes: list[int], chunk: range | None = None) -> AttentionStep:
    """Decode tokens at these positions, then a chunk."""
    positions = np.array([*decodes, *(chunk or ())], np.int32)
    slots = np.arange(len(positions), dtype=np.int32)
    spans = [ChunkSpan(len(decodes), len(positions), 0)] if chunk is not None else []
    return AttentionStep(BlockId(BlockKind.ATTENTION, 0), slots, slots, positions, len(decodes), spans)


def test_decode_tokens_see_all_before_them_and_themselves() -> None:
    assert ContextCounter(MIXTRAL, H100).count(step_of([9, 19])) == 10 + 20
    assert ContextCounter(MIXTRAL, H100, offset=100).count(step_of([9, 19])) == 110 + 120


def test_short_chunk_reads_its_context_once() -> None:
    assert ContextCounter(MIXTRAL, H100).count(step_of([9], range(100, 108))) == 10 + 108


def test_long_chunk_is_bound_by_computing() -> None:
    computing = MIXTRAL.attention_flops / H100.flops
    reading = MIXTRAL.kv_bytes / H100.bandwidth
    pairs = 2000 * 2001 / 2
    assert ContextCounter(MIXTRAL, H100).count(step_of([], range(2000))) == pytest.approx(pairs * computing / reading)

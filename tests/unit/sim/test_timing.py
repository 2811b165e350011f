"""Durations of steps, slow devices and outages."""

from __future__ import annotations

import math

import numpy as np
import pytest

from amoe.core.steps import AttentionStep, ChunkSpan, HeadStep
from amoe.profiles.costs import RooflineCosts
from amoe.sim.config import HostModel, Outage, Slowdown
from amoe.sim.timing import StepTimer, Timeline
from amoe.types import BlockId, BlockKind
from tests.unit.sim.cases import DEVICE, SIZES

COSTS = RooflineCosts(SIZES, DEVICE)


def attention_step(decode_positions: list[int], chunks: list[tuple[int, int]]) -> AttentionStep:
    """Decode tokens at positions, and chunks [start, end) of positions."""
    positions, spans = list(decode_positions), []
    for start, end in chunks:
        spans.append(ChunkSpan(len(positions), len(positions) + end - start, 0))
        positions += range(start, end)
    slots = np.arange(len(positions), dtype=np.int32)
    block = BlockId(BlockKind.ATTENTION, 1)
    return AttentionStep(block, slots, slots, np.array(positions, np.int32), len(decode_positions), spans)


def test_decode_tokens_see_everything_before_them_and_themselves():
    timer = StepTimer(SIZES, DEVICE)
    assert timer.seconds(attention_step([0, 9, 99], []), 0.0) == COSTS.attention(1, 3, 1 + 10 + 100)


def test_an_offset_is_context_too():
    timer = StepTimer(SIZES, DEVICE, context_offset=500)
    assert timer.seconds(attention_step([0, 9], []), 0.0) == COSTS.attention(1, 2, 501 + 510)


def test_a_chunk_reads_its_context_once_and_computes_every_pair():
    timer = StepTimer(SIZES, DEVICE)
    params = SIZES.block_params(1)
    for start, end in ((0, 1), (10, 20), (0, 2000), (30_000, 30_002)):
        count = end - start
        pairs = sum(range(start + 1, end + 1))
        linear = max(2 * params * count / DEVICE.flops, params * 2 / DEVICE.bandwidth)
        mixing = max(SIZES.attention_flops * pairs / DEVICE.flops, SIZES.kv_bytes * end / DEVICE.bandwidth)
        expected = DEVICE.launch_s + linear + mixing
        assert timer.seconds(attention_step([], [(start, end)]), 0.0) == pytest.approx(expected, rel=1e-3)


def test_a_step_without_tokens_takes_no_time():
    timer = StepTimer(SIZES, DEVICE)
    empty = np.empty(0, np.int32)
    assert timer.seconds(HeadStep(BlockId(BlockKind.HEAD, 3), empty, empty), 0.0) == 0.0


def test_the_latest_slowdown_holds():
    timer = StepTimer(SIZES, DEVICE, [Slowdown(rank=0, factor=1.5, at_s=2.0), Slowdown(rank=0, factor=3.0, at_s=1.0)])
    step = HeadStep(BlockId(BlockKind.HEAD, 3), np.zeros(4, np.int32), np.zeros(4, np.int32))
    factors = [timer.seconds(step, now) / COSTS.head(4) for now in (0.0, 0.99, 1.0, 1.99, 2.0, 50.0)]
    assert factors == pytest.approx([1, 1, 3, 3, 1.5, 1.5])


def test_outages_stop_the_work_but_lose_none():
    timeline = Timeline([Outage(rank=0, start_s=5.0, end_s=6.0), Outage(rank=0, start_s=1.0, end_s=3.0)])
    assert [timeline.available(now) for now in (0.5, 1.0, 2.0, 3.0, 5.5)] == [0.5, 3.0, 3.0, 3.0, 6.0]
    assert timeline.finish(0.0, 1.0) == 1.0
    assert timeline.finish(0.0, 1.5) == 3.5
    assert timeline.finish(0.5, 3.0) == 6.5  # 0.5 before the first, 2 between them, 0.5 after the second
    assert timeline.finish(6.0, 1.0) == 7.0


def test_the_dead_do_not_come_back():
    timeline = Timeline([Outage(rank=0, start_s=1.0)])
    assert timeline.available(2.0) == math.inf
    assert timeline.finish(0.5, 1.0) == math.inf
    assert timeline.finish(0.0, 1.0) == 1.0


@pytest.mark.parametrize(
    ("mode", "now", "visible"),
    [
        ("serial", 10.0, 3.0),
        ("prelaunched", 12.0, 1.0),  # the step before ran from 10 to 12
        ("prelaunched", 12.5, 3.0),
        ("queued", 12.0, 1.0),
        ("queued", 12.5, 0.5),
        ("queued", 20.0, 0.0),
    ],
)
def test_how_much_of_the_host_time_is_seen(mode, now, visible):
    assert HostModel(seconds=3.0, mode=mode).visible(now, 10.0, 12.0) == visible


def test_before_the_first_step_nothing_hides_host_time_but_a_queue():
    assert HostModel(seconds=3.0, mode="prelaunched").visible(0.0, -math.inf, -math.inf) == 3.0
    assert HostModel(seconds=3.0, mode="queued").visible(0.0, -math.inf, -math.inf) == 0.0

"""The barriers of lockstep: what is ready, and when an epoch begins and ends."""

from __future__ import annotations

import numpy as np

from amoe.core.batcher import Entry
from amoe.core.lockstep import ExpertsBarrier, HomeBarrier
from amoe.types import Batch, BatchKind, BlockId, BlockKind

HOMES, OWNERS = (0, 1), (2, 3)
ATTENTION, EXPERTS, HEAD = BlockKind.ATTENTION, BlockKind.EXPERTS, BlockKind.HEAD


class FakeCore:
    """Stands in for an `AttentionCore`: `tokens` wait to start, at most `max_decodes` at once."""

    def __init__(self, tokens=0, running=0):
        self.tokens = tokens
        self.running = dict.fromkeys(range(running))
        self.entered = []

    @property
    def batcher(self):
        return self

    @property
    def num_ready(self):
        return self.tokens

    def start(self, now, max_decodes=None):
        taken = self.tokens if max_decodes is None else min(self.tokens, max_decodes)
        self.tokens -= taken
        return Entry(np.arange(taken, dtype=np.int32))

    def enter(self, entry, wave, now):
        if entry.num_tokens:
            self.entered.append((wave, entry.num_tokens))


def announce(src, count, wave=0, epoch=0):
    return Batch(BatchKind.ANNOUNCE, src, 0, 0, wave, epoch, count)


def dispatch(src, layer, epoch=0, wave=0):
    return Batch(BatchKind.DISPATCH, src, 2, layer, wave, epoch)


def result(src, layer, epoch=0, wave=0):
    return Batch(BatchKind.RESULT, src, 0, layer, wave, epoch)


def home_barrier(rank=0, num_layers=2, num_waves=1):
    return HomeBarrier(rank, HOMES, OWNERS, num_layers, num_waves)


def begun(barrier, core, *counts, epoch=0):
    """Bring an epoch to its first block."""
    sent = barrier.start(core, 0.0)
    for src, count in enumerate(counts):
        barrier.on_announce(announce(src, count, epoch=epoch))
    return sent, barrier.start(core, 0.0)


def test_a_home_with_tokens_announces_them_to_everybody_once():
    barrier, core = home_barrier(), FakeCore(tokens=3)
    sent = [out.batch for out in barrier.start(core, 0.0)]
    assert [(batch.kind, batch.dst, batch.count) for batch in sent] == [(BatchKind.ANNOUNCE, r, 3) for r in range(4)]
    assert core.entered == [(0, 3)]
    assert barrier.start(core, 0.0) == []
    assert barrier.ready() == []


def test_nobody_speaks_without_tokens_or_an_invitation():
    barrier = home_barrier()
    assert barrier.start(FakeCore(), 0.0) == []


def test_an_invited_home_without_tokens_says_zero_and_takes_no_part():
    barrier, core = home_barrier(rank=1), FakeCore()
    barrier.on_announce(announce(0, 5))
    sent = [out.batch for out in barrier.start(core, 0.0)]
    assert [batch.count for batch in sent] == [0] * 4
    barrier.on_announce(announce(1, 0))
    assert barrier.start(core, 0.0) == []
    assert barrier.ready() == []
    core.tokens = 2  # the next epoch is open to it although the first is not over
    assert [out.batch.epoch for out in barrier.start(core, 0.0)] == [1] * 4


def test_an_empty_epoch_ends_and_the_next_is_answered_in_the_same_turn():
    barrier, core = home_barrier(rank=1), FakeCore()
    barrier.on_announce(announce(0, 5))
    barrier.start(core, 0.0)
    barrier.on_announce(announce(1, 0))
    barrier.on_announce(announce(0, 4, epoch=1))
    assert [out.batch.epoch for out in barrier.start(core, 0.0)] == [1] * 4


def test_attention_waits_for_every_expert_worker_and_the_head_ends_the_epoch():
    barrier, core = home_barrier(), FakeCore(tokens=1)
    begun(barrier, core, 1, 0)
    assert barrier.ready() == [(BlockId(ATTENTION, 0, 0), 0)]
    for layer in range(2):
        assert barrier.dispatched(0) == 0
        assert barrier.ready() == []
        barrier.on_result(result(2, layer))
        barrier.on_result(result(2, layer))
        assert barrier.ready() == []
        barrier.on_result(result(3, layer))
        block = BlockId(HEAD, 2, 0) if layer == 1 else BlockId(ATTENTION, 1, 0)
        assert barrier.ready() == [(block, 0)]
    barrier.finish(0)
    assert barrier.ready() == []
    core.tokens = 1
    assert [out.batch.epoch for out in barrier.start(core, 0.0)] == [1] * 4


def test_a_dense_layer_waits_for_nobody():
    barrier, core = home_barrier(), FakeCore(tokens=1)
    begun(barrier, core, 1, 0)
    barrier.passed(0)
    assert barrier.ready() == [(BlockId(ATTENTION, 1, 0), 0)]


def test_answers_of_other_layers_and_epochs_do_not_count():
    barrier, core = home_barrier(), FakeCore(tokens=1)
    begun(barrier, core, 1, 0)
    barrier.dispatched(0)
    for src in OWNERS:
        barrier.on_result(result(src, 1))
        barrier.on_result(result(src, 0, epoch=1))
    assert barrier.ready() == []


def test_micro_batches_share_the_running_sequences():
    barrier, core = home_barrier(num_waves=3), FakeCore(tokens=7, running=7)
    barrier.start(core, 0.0)
    assert core.entered == [(0, 3), (1, 3), (2, 1)]


def test_micro_batches_are_ready_each_on_its_own():
    barrier, core = home_barrier(num_waves=2), FakeCore(tokens=4, running=4)
    barrier.start(core, 0.0)
    barrier.on_announce(announce(0, 2, wave=1))
    barrier.on_announce(announce(1, 2, wave=1))
    barrier.start(core, 0.0)
    assert barrier.ready() == [(BlockId(ATTENTION, 0, 1), 0)]


def test_experts_wait_for_every_home_that_brings_tokens_and_answer_those():
    barrier, block = ExpertsBarrier(HOMES), BlockId(EXPERTS, 1, 0)
    barrier.on_dispatch(dispatch(0, 1))
    assert barrier.ready() == [], "who brings tokens is not known yet"
    barrier.on_announce(announce(0, 2))
    barrier.on_announce(announce(1, 3))
    assert barrier.ready() == []
    barrier.on_dispatch(dispatch(1, 1))
    assert barrier.ready() == [(block, 0)]
    assert barrier.complete(block) == (0, frozenset({0, 1}))
    assert barrier.ready() == []


def test_experts_do_not_wait_for_homes_that_bring_nothing():
    barrier, block = ExpertsBarrier(HOMES), BlockId(EXPERTS, 0, 0)
    barrier.on_announce(announce(0, 2))
    barrier.on_announce(announce(1, 0))
    barrier.on_dispatch(dispatch(0, 0))
    assert barrier.ready() == [(block, 0)]
    assert barrier.complete(block) == (0, frozenset({0}))


def test_a_late_copy_of_a_dispatch_starts_no_old_epoch():
    barrier, block = ExpertsBarrier(HOMES), BlockId(EXPERTS, 0, 0)
    for epoch in range(2):
        barrier.on_announce(announce(0, 1, epoch=epoch))
        barrier.on_announce(announce(1, 0, epoch=epoch))
        barrier.on_dispatch(dispatch(0, 0, epoch))
        barrier.complete(block)
    barrier.on_dispatch(dispatch(0, 0, epoch=0))
    assert barrier.ready() == []
    barrier.on_announce(announce(0, 1, epoch=2))
    barrier.on_announce(announce(1, 0, epoch=2))
    barrier.on_dispatch(dispatch(0, 0, epoch=2))
    assert barrier.ready() == [(block, 2)]


def test_a_late_copy_of_an_announcement_is_not_kept():
    barrier, core = home_barrier(rank=1), FakeCore()
    for epoch in range(2):
        barrier.on_announce(announce(0, 5, epoch=epoch))
        begun(barrier, core)
        barrier.on_announce(announce(1, 0, epoch=epoch))
        barrier.start(core, 0.0)
    barrier.on_announce(announce(0, 5, epoch=0))
    assert not barrier._announcements.any(wave=0, epoch=0)
    assert barrier.start(core, 0.0) == []

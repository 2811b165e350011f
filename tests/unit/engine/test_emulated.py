"""Emulated executors: how they wait, and what they make up."""

from __future__ import annotations

import numpy as np
import pytest

from amoe.config import CacheConfig, SchedulerConfig
from amoe.core.batcher import Batcher
from amoe.core.steps import AttentionStep, ExpertsStep, HeadStep, PromptTokens
from amoe.engine.emulated import EmulatedAttention, EmulatedExperts, RouterPool, Waiter, valid_vocabulary
from amoe.engine.sampling_table import SamplingTable
from amoe.profiles.context import ContextCounter
from amoe.profiles.costs import RooflineCosts
from amoe.profiles.devices import DEVICES
from amoe.profiles.models import MODELS
from amoe.profiles.routing import log_normal_routing
from amoe.types import BlockId, BlockKind, SamplingParams

SIZES = MODELS["deepseek-v3"]
COSTS = RooflineCosts(SIZES, DEVICES["h100"])


class FakeTime:
    """A clock, and a sleep that wakes early: by half of what is left, until little is."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds / 2 if seconds > 0.25 else seconds


@pytest.fixture
def fake() -> FakeTime:
    return FakeTime()


@pytest.fixture
def waiter(fake: FakeTime) -> Waiter:
    return Waiter(fake.clock, fake.sleep)


def test_waits_to_an_absolute_deadline(fake: FakeTime, waiter: Waiter) -> None:
    waiter.start()
    fake.now += 0.5  # host time inside the step
    waiter.finish(2.0)
    assert fake.now == pytest.approx(102.0)
    assert fake.slept[0] == pytest.approx(1.5)
    assert (waiter.modelled_s, waiter.late_s) == (2.0, 0.0)


def test_does_not_wait_when_the_host_has_taken_longer(fake: FakeTime, waiter: Waiter) -> None:
    waiter.start()
    fake.now += 3.0
    waiter.finish(2.0)
    assert not fake.slept
    assert (waiter.modelled_s, waiter.late_s) == (2.0, 1.0)


def attention_of(waiter: Waiter, vocabulary: np.ndarray | None = None) -> EmulatedAttention:
    scheduler = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=16)
    batcher = Batcher(scheduler, CacheConfig(), 64, 128, 2)
    rng = np.random.default_rng(0)
    router = RouterPool(log_normal_routing(SIZES, 1.0, 0), rng, pool_tokens=64)
    words = np.array([3, 5]) if vocabulary is None else vocabulary
    return EmulatedAttention(SIZES, COSTS, ContextCounter(SIZES, DEVICES["h100"]), router, batcher, words, rng, waiter)


def step_at(layer: int, positions: list[int]) -> AttentionStep:
    slots = np.arange(len(positions), dtype=np.int32)
    return AttentionStep(
        BlockId(BlockKind.ATTENTION, layer), slots, slots, np.array(positions, np.int32), len(positions)
    )


def test_attention_takes_its_modelled_time(fake: FakeTime, waiter: Waiter) -> None:
    routed = attention_of(waiter).attention(step_at(3, [9, 19]))
    assert fake.now - 100.0 == pytest.approx(COSTS.attention(3, 2, 10 + 20))
    assert routed is not None
    topk_ids, weights, rows, scores = routed
    assert scores is None
    assert topk_ids.shape == (2, SIZES.top_k)
    assert topk_ids.dtype == np.int64
    assert all(len(set(ids)) == SIZES.top_k for ids in topk_ids.tolist())
    assert topk_ids.max() < SIZES.num_experts
    assert np.allclose(weights.sum(axis=1), 1.0)
    assert tuple(rows.shape) == (2, SIZES.hidden_size)


def test_dense_layers_route_nothing(fake: FakeTime, waiter: Waiter) -> None:
    assert attention_of(waiter).attention(step_at(0, [0])) is None
    assert fake.now - 100.0 == pytest.approx(COSTS.attention(0, 1, 1))


def test_experts_take_the_time_of_their_pairs(fake: FakeTime, waiter: Waiter) -> None:
    ids = np.array([[4, -1], [4, 7], [-1, -1]], np.int16)
    rows = np.arange(3, dtype=np.int32)
    step = ExpertsStep(BlockId(BlockKind.EXPERTS, 5), rows, ids, np.ones(ids.shape, np.float32), [])
    out = EmulatedExperts(SIZES, COSTS, 16, waiter, {}).experts(step)
    counts = np.zeros(SIZES.num_experts, np.int64)
    counts[[4, 7]] = 2, 1
    assert fake.now - 100.0 == pytest.approx(float(COSTS.experts(5, counts)))
    assert tuple(out.shape) == (3, SIZES.hidden_size)


def test_sampled_tokens_never_end_a_sequence(fake: FakeTime, waiter: Waiter) -> None:
    vocabulary = valid_vocabulary(6, (0, 2, 4))
    assert vocabulary.tolist() == [1, 3, 5]
    assert valid_vocabulary(1, (0,)).tolist() == [0]
    table = SamplingTable(8, 6)
    for row in range(8):
        table.set(row, SamplingParams(max_tokens=4, logprobs=2 if row == 1 else None), 0, (0, 2, 4))
    rows = np.arange(8, dtype=np.int32)
    step = HeadStep(BlockId(BlockKind.HEAD, SIZES.num_layers), rows, rows)
    sampled = attention_of(waiter, vocabulary).sample(step, table, np.zeros(8, np.int64))
    assert set(sampled.token_ids.tolist()) <= {1, 3, 5}
    assert fake.now - 100.0 == pytest.approx(COSTS.head(8))
    assert sampled.logprobs is not None
    assert sampled.top_ids is not None
    assert sampled.top_ids.shape == (8, 2)


def test_prompts_are_scored_with_zeros_in_the_time_of_a_head(fake: FakeTime, waiter: Waiter) -> None:
    slots = np.arange(5, dtype=np.int32)
    scored = attention_of(waiter).score(PromptTokens(slots, slots, slots), np.arange(10, 15), 3)
    assert fake.now - 100.0 == pytest.approx(COSTS.head(5))
    assert scored.token_ids.tolist() == [10, 11, 12, 13, 14]
    assert scored.logprobs is not None and scored.top_ids is not None and scored.top_logprobs is not None
    assert not scored.logprobs.any()
    assert scored.top_ids.shape == scored.top_logprobs.shape == (5, 3)


def test_pool_follows_the_popularity() -> None:
    routing = log_normal_routing(MODELS["mixtral-8x7b"], 1.25, 1)
    drawn = RouterPool(routing, np.random.default_rng(0)).draw(2, 20_000)[0]
    shares = np.bincount(drawn.ravel(), minlength=8) / drawn.size
    assert np.abs(shares - routing.popularity()[2]).max() < 0.02


def test_weights_that_nobody_has_are_counted_as_they_come_and_go(waiter: Waiter) -> None:
    experts = EmulatedExperts(SIZES, COSTS, 16, waiter, {0: (1, 2), 5: (3,)}, other_bytes=7.0)
    assert experts.parameter_bytes == int(7 + 3 * SIZES.expert_bytes)
    experts.install(5, experts.prepare(5, (3, 4)))
    experts.install(0, experts.prepare(0, ()))
    assert experts.held() == {0: (), 5: (3, 4)}
    assert experts.parameter_bytes == int(7 + 2 * SIZES.expert_bytes)

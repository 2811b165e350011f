"""What one home decides, looked at directly: caps where the pairs really go, phases, spans, telemetry."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoe.config import CacheConfig, CapacityConfig, SchedulerConfig
from amoe.core.backlog import OwnerBacklog, WorkMeter
from amoe.core.batcher import Batcher
from amoe.core.capacity import HomeCapacity
from amoe.core.dispatcher import Pairs
from amoe.core.micro_queue import MicroQueues
from amoe.core.replica_shares import ReplicaShares
from amoe.core.sequence import UsageColumn
from amoe.policy.capacity import group_capacity
from amoe.policy.placement import replicate_experts
from amoe.types import Batch, BatchKind, BlockId, BlockKind, SamplingParams
from tests.unit.core.scenario import random_shares
from tests.unit.policy.test_capacity import router

NUM_EXPERTS, TOP_K, NUM_OWNERS = 12, 3, 3


class Home:
    """A home with `num_tokens` decode tokens, each of a sequence of its own; every third is exact."""

    def __init__(
        self, config: CapacityConfig, num_tokens: int, *, seed: int = 0, local_owner: int | None = None
    ) -> None:
        rng = np.random.default_rng(seed)
        scheduler = SchedulerConfig(max_num_seqs=num_tokens + 1, max_num_batched_tokens=4 * num_tokens + 4)
        self.batcher = Batcher(scheduler, CacheConfig(), 4 * num_tokens + 4, 64, NUM_OWNERS)
        for number in range(num_tokens):
            params = SamplingParams(max_tokens=4, capacity="exact" if number % 3 == 0 else "best_effort")
            self.batcher.add(number, np.array([1, 2], np.int32), params)
        self.slots = np.array([chunk[-1] for chunk in self.batcher.start().chunks], np.int32)
        self.replicas = ReplicaShares(
            replicate_experts(rng.lognormal(0, 1, (1, NUM_EXPERTS)), NUM_OWNERS, 6), 0, NUM_OWNERS
        )
        self.replicas.set(random_shares(self.replicas.owners, rng))
        self.capacity = HomeCapacity(
            config, self.replicas, self.batcher, seed=seed, renormalise=False, local_owner=local_owner
        )
        self.scores = router(rng, num_tokens, NUM_EXPERTS, 1.0)
        self.topk_ids = np.argsort(-self.scores, axis=1, kind="stable")[:, :TOP_K]
        self.weights = np.take_along_axis(self.scores, self.topk_ids, axis=1)

    @property
    def is_exact(self) -> np.ndarray:
        return self.batcher.table.is_exact[self.batcher.tokens.row[self.slots]]

    def decide(self, is_prefill: bool = True, now: float = 0.0):
        flags = np.full(len(self.slots), is_prefill)
        wanted = Pairs(self.topk_ids, self.weights, self.replicas.choose(0, self.topk_ids))
        return self.capacity.decide(0, self.slots, flags, wanted, self.scores, now)


configs = st.builds(
    CapacityConfig,
    factor=st.sampled_from([0.5, 1.0, 1.5]),
    mode=st.sampled_from(["drop", "reroute", "expanded"]),
    scope=st.sampled_from(["device", "expert"]),
    phase=st.just("both"),
    keep_best=st.booleans(),
)


@given(configs, st.integers(0, 2**32), st.integers(1, 40), st.sampled_from([None, 0, 2]))
def test_the_cap_holds_where_the_pairs_really_go(config, seed, num_tokens, local_owner):
    home = Home(config, num_tokens, seed=seed, local_owner=local_owner)
    pairs = home.decide()
    there = pairs.expert_ids >= 0
    assert ((pairs.owners >= 0) == there).all()
    held = home.replicas.holds(0)
    assert held[pairs.expert_ids[there], pairs.owners[there]].all(), "the expert does not live there"
    if config.scope == "device":
        loads = np.bincount(pairs.owners[there], minlength=NUM_OWNERS + 1)  # and nobody
        per_group = home.replicas.experts_held(0)
    else:
        loads = np.bincount(pairs.expert_ids[there], minlength=NUM_EXPERTS)
        per_group = np.ones(NUM_EXPERTS)
    over = np.maximum(0, loads - group_capacity(config.factor, home.topk_ids.size, per_group)).sum()
    assert home.is_exact.all() or over == home.capacity.ledger.num_over
    assert (pairs.expert_ids[home.is_exact, :TOP_K] == home.topk_ids[home.is_exact]).all()
    assert (pairs.weights[home.is_exact, :TOP_K] == home.weights[home.is_exact]).all()


@pytest.mark.parametrize(
    ("phase", "prefill", "decode"), [("prefill", True, False), ("decode", False, True), ("both", True, True)]
)
def test_phases(phase, prefill, decode):
    for is_prefill, touched in ((True, prefill), (False, decode)):
        home = Home(CapacityConfig(factor=0.5, phase=phase), 30)
        home.decide(is_prefill)
        usage = home.batcher.table.usage[home.batcher.tokens.row[home.slots]]
        assert (usage[:, UsageColumn.PAIRS] == TOP_K).all()
        assert (usage[:, UsageColumn.TOKENS] == 1).all()
        assert (usage[:, UsageColumn.DROPPED].sum() > 0) == touched


def answer(home: Home, owner: int, backlog_s: float, row_s: float, now: float, slots=()) -> None:
    batch = Batch(BatchKind.RESULT, owner, 0, 0, slots=np.array(slots, np.int32), backlog_s=backlog_s, row_s=row_s)
    home.capacity.heard(owner, batch, now)


@pytest.mark.parametrize("local_owner", [None, 0])
@pytest.mark.parametrize("mode", ["drop", "reroute"])
def test_nobody_new_goes_to_a_late_worker(mode, local_owner):
    """The late worker has replicas of most experts, and may be the home's own."""
    found = 0
    for seed in range(8):
        config = CapacityConfig(slack_s=0.0, mode=mode, phase="both")
        home = Home(config, 40, seed=seed, local_owner=local_owner)
        before = home.replicas.choose(0, home.topk_ids)
        for owner in range(NUM_OWNERS):
            answer(home, owner, 5.0 * (owner == 0), 1e-3, 1.0)
        pairs = home.decide(now=1.0)
        new = (pairs.expert_ids[:, :, None] != home.topk_ids[:, None, :]).all(axis=2) & (pairs.expert_ids >= 0)
        assert not (new & (pairs.owners == 0)).any()
        assert (pairs.owners == 0).sum() < (before == 0).sum()
        found += int(new.sum())
    assert (found > 0) == (mode == "reroute")


def test_a_cost_of_nothing_per_row_is_known_and_no_cost_is_not():
    home = Home(CapacityConfig(slack_s=0.1, phase="both"), 40)
    for owner in range(NUM_OWNERS):
        answer(home, owner, 9.0 * (owner == 1), -1.0, 1.0)
    home.decide(now=1.0)
    assert home.capacity.ledger.lost.sum() == 0
    for owner in range(NUM_OWNERS):
        answer(home, owner, 9.0 * (owner == 1), 0.0, 1.0)
    home.decide(now=1.0)
    assert home.capacity.ledger.lost.sum() > 0
    lost = home.capacity.ledger.lost.sum()
    home.decide(now=1.0 + CapacityConfig().telemetry_s + 0.1)
    assert home.capacity.ledger.lost.sum() == lost, "what was told long ago says nothing any more"


def test_what_was_sent_after_the_answered_rows_is_added():
    backlog = OwnerBacklog(2, 10, slack_s=0.1, telemetry_s=1.0)
    to_first = np.array([[True, False]])
    for slot in range(5):
        backlog.send(np.array([slot]), to_first)
    backlog.hear(0, np.array([1, 0]), 2.0, 0.5, 0.0)  # an answer about the first two: three are on their way
    backlog.hear(1, np.array([], np.int32), 0.25, 0.5, 0.0)
    waits = backlog.waits(0.5)
    np.testing.assert_allclose(waits.wait_s, [2.0 - 0.5 + 3 * 0.5, 0.0])
    assert waits.is_known.all()
    assert not backlog.waits(1.5).is_known.any()


def test_the_meter_adds_up_what_waits():
    queues = MicroQueues(2, 1)
    meter = WorkMeter(queues)
    assert meter.measure() == (0.0, -1.0)
    for rows in (10, 20, 30):
        meter.observe(BlockKind.EXPERTS, rows, 1e-3 + 1e-5 * rows)
        meter.observe(BlockKind.ATTENTION, rows, 2e-3)
    for block, rows in ((BlockId(BlockKind.EXPERTS, 0), 8), (BlockId(BlockKind.EXPERTS, 1), 4)):
        queues.push(block, (np.arange(rows),), np.zeros(rows, np.int32), 0.0)
    queues.push(BlockId(BlockKind.ATTENTION, 1), (np.arange(3),), np.zeros(3, np.int32), 0.0)
    seconds, row_s = meter.measure()
    assert row_s == pytest.approx(1e-5)
    assert seconds == pytest.approx(2e-3 + 12e-5 + 2e-3)


def test_spans_are_positions_of_the_prompt_whatever_the_chunks():
    scheduler = SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=5)
    batcher = Batcher(scheduler, CacheConfig(block_size=4), 20, 64, 1)
    params = SamplingParams(max_tokens=2, droppable_spans=((3, 7), (9, 10)))
    batcher.add(0, np.arange(12, dtype=np.int32), params)
    marked = []
    for _ in range(3):
        (chunk,) = batcher.start().chunks
        tokens = batcher.tokens
        marked += [int(p) for p in tokens.position[chunk][tokens.drop_first[chunk]]]
        batcher.finish_chunk(int(tokens.leader[chunk[0]]))
    assert marked == [3, 4, 5, 6, 9]

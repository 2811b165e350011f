"""Steering by heartbeats: of workers that a script plays, and of a cluster of modelled devices."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from amoe.clock import ManualClock
from amoe.config import EngineConfig, PlacementConfig, ScheduleName, SchedulerConfig, SteeringConfig
from amoe.core.replica_shares import ReplicaShares
from amoe.engine import steering
from amoe.engine.emulated_device import EmulatedDevice
from amoe.engine.messages import Steer, Topology
from amoe.engine.steering import Steering
from amoe.policy.placement import place_experts, replicate_experts
from amoe.policy.rebalance import Room, rebalance
from amoe.policy.steering import count_work
from amoe.profiles.models import MODELS
from amoe.stats import BATCH_SIZE_EDGES, HistogramSnapshot, LayerHistograms, SteeringStats, WorkerStats
from amoe.types import SamplingParams
from tests.fake_workers import make_engine, make_tokenizer

SIZES = MODELS["olmoe-1b-7b"]
NUM_SEQUENCES = 16384
NUM_CONTEXT = 100
NUM_WAVES = 2


class ModelledCluster:
    """Colocated workers that do what is asked of them in the time of their profile, and say so."""

    def __init__(self, device: str, num_workers: int, schedule: ScheduleName = "waves", spare: int = 4) -> None:
        self.device = EmulatedDevice.parse(device)
        self.popularity = self.device.routing(SIZES).popularity()
        self.owners = place_experts(SIZES.num_layers, SIZES.num_experts, num_workers)
        if spare:
            slots = SIZES.num_experts // num_workers + spare
            self.owners = replicate_experts(self.popularity, num_workers, slots)
        placement = PlacementConfig(colocated=num_workers, redundant_experts=spare)
        self.config = EngineConfig(
            model="m", device=device, placement=placement, scheduler=SchedulerConfig(schedule=schedule)
        )
        self.clock = ManualClock()
        self.sent: list[tuple[int, Steer]] = []
        self.told: list[SteeringStats] = []
        self.steering = Steering(
            self.config,
            self.owners,
            self.clock,
            send=lambda rank, message: self.sent.append((rank, message)),
            tell=lambda state: self.told.append(replace(state)),
        )
        self.replicas = [ReplicaShares(self.owners, rank, num_workers) for rank in range(num_workers)]
        self.costs = [self.device.costs(SIZES, rank) for rank in range(num_workers)]
        num_waves = 0 if schedule == "lockstep" else NUM_WAVES
        pairs = [[0] * SIZES.num_experts for _ in range(SIZES.num_layers)]
        self.stats = [
            WorkerStats(rank, "colocated", num_waves=num_waves, expert_pairs=pairs) for rank in range(num_workers)
        ]
        self.sizes = [LayerHistograms(SIZES.num_layers, BATCH_SIZE_EDGES) for _ in range(num_workers)]
        self.busy = np.zeros(num_workers)

    def iterate(self) -> None:
        """One token for every sequence; then all heartbeats."""
        shares = np.array([self.steering.state.home_share[rank] for rank in range(len(self.stats))])
        before = [stats.home_s + stats.experts_s for stats in self.stats]
        for layer in range(SIZES.num_layers):
            arriving = sum(self._attend(rank, layer, share) for rank, share in enumerate(shares.tolist()))
            for rank, counts in enumerate(arriving):
                self._compute(rank, layer, counts)
        self.clock.advance(1.0)
        for stats, sizes in zip(self.stats, self.sizes, strict=True):
            stats.batch_sizes = sizes.snapshot("attention")
            self.steering.observe(stats)
        self.busy = np.array([s.home_s + s.experts_s - b for s, b in zip(self.stats, before, strict=True)])

    def _attend(self, rank: int, layer: int, share: float) -> np.ndarray:
        """[D, E] pairs that a wave's tokens of one home send to the owners. All waves are alike."""
        num_tokens = round(share * NUM_SEQUENCES / NUM_WAVES)
        self.stats[rank].home_s += NUM_WAVES * self.costs[rank].attention(layer, num_tokens, num_tokens * NUM_CONTEXT)
        for _ in range(NUM_WAVES):
            self.sizes[rank].observe(layer, num_tokens)
        pairs = np.rint(self.popularity[layer] * num_tokens * SIZES.top_k).astype(np.int64)
        ids = np.repeat(np.arange(SIZES.num_experts), pairs)[:, None]
        where = self.replicas[rank].choose(layer, ids)
        counts = np.zeros((len(self.stats), SIZES.num_experts), np.int64)
        np.add.at(counts, (where.ravel(), ids.ravel()), 1)
        return counts

    def _compute(self, rank: int, layer: int, counts: np.ndarray) -> None:
        stats = self.stats[rank]
        stats.experts_s += NUM_WAVES * float(self.costs[rank].experts(layer, counts))
        stats.expert_work += NUM_WAVES * count_work(counts, self.config.ridge_tokens)
        rows = [list(row) for row in stats.expert_pairs]
        rows[layer] = (np.array(rows[layer]) + NUM_WAVES * counts).tolist()
        stats.expert_pairs = rows

    def obey(self) -> None:
        """The homes receive what was sent."""
        for rank, message in self.sent:
            self.replicas[rank].set(np.frombuffer(message.shares, "<f4").reshape(self.owners.shape))
        self.sent.clear()

    async def settle(self, num_plans: int = 12) -> None:
        for _ in range(num_plans):
            for _ in range(3):
                self.iterate()
            await self.steering.steer()
            self.obey()

    def pairs_at(self, rank: int) -> float:
        """Part of the pairs that shares now send to an owner."""
        parts = np.where(self.owners == rank, self.replicas[0].shares, 0.0).sum(axis=-1)
        return float((parts * self.popularity).sum()) / SIZES.num_layers


async def test_a_straggler_gets_fewer_pairs_and_fewer_sequences() -> None:
    cluster = ModelledCluster("emulated:h100,straggler=2:1.5", 4)
    cluster.iterate()
    before = cluster.busy
    assert cluster.steering.state.home_share == dict.fromkeys(range(4), 0.25)
    await cluster.settle()
    state = cluster.steering.state
    assert state.owner_speed[2] == pytest.approx(1 / 1.5, rel=0.05)
    assert [state.owner_speed[rank] for rank in (0, 1, 3)] == pytest.approx([1, 1, 1], rel=0.05)
    assert cluster.pairs_at(2) < min(cluster.pairs_at(rank) for rank in (0, 1, 3))
    assert state.home_share[2] < 0.9 * min(state.home_share[rank] for rank in (0, 1, 3))
    assert cluster.busy.max() < 0.85 * before.max()
    assert cluster.busy.max() / cluster.busy.min() < 1.1
    assert 0 < state.moved < 0.5
    assert cluster.told[-1] == state


async def test_who_is_four_times_slower_gets_its_share_of_the_work() -> None:
    """Everybody holds every expert, and a home may choose: the slow one's part becomes 1/4 of the others', so that all
    take as long; MAX_SPEED_RATIO leaves room for that much and no more."""
    cluster = ModelledCluster("emulated:h100,straggler=2:4", 4, spare=48)
    cluster.iterate()
    seconds = [stats.experts_s for stats in cluster.stats]
    assert max(seconds) > 3.5 * min(seconds), "even shares, uneven times"
    await cluster.settle(6)
    assert cluster.steering.state.owner_speed[2] == pytest.approx(1 / 4, rel=0.05)
    assert cluster.pairs_at(2) == pytest.approx((1 / 4) / (3 + 1 / 4), rel=0.15)
    before = [stats.experts_s for stats in cluster.stats]
    cluster.iterate()
    seconds = [stats.experts_s - earlier for stats, earlier in zip(cluster.stats, before, strict=True)]
    assert max(seconds) < 1.25 * min(seconds)


async def test_speeds_move_experts_where_there_are_no_replicas() -> None:
    """What `policy.rebalance` does with them: a third of the experts, then a twelfth or so at the slow one."""
    cluster = ModelledCluster("emulated:h100,straggler=1:4", 3, spare=0)
    assert cluster.steering.measured_speeds().tolist() == [1, 1, 1]
    cluster.iterate()
    speeds = cluster.steering.measured_speeds()
    assert speeds.tolist() == [1, pytest.approx(1 / 4, rel=0.05), 1]
    load = cluster.steering.measured_load()
    assert load is not None
    everybody = np.ones(3, np.bool_)
    room = Room(SIZES.num_experts, SIZES.num_experts)
    table = rebalance(load, cluster.owners, everybody, room, speeds)
    at_slow = (np.where(table == 1, 1.0, 0.0).sum(axis=-1) * cluster.popularity).sum() / SIZES.num_layers
    assert at_slow == pytest.approx((1 / 4) / (2 + 1 / 4), abs=0.03)


async def test_homes_beside_hot_experts_get_fewer_sequences() -> None:
    """No replicas: the experts stay where they are, and the sequences make room for them."""
    cluster = ModelledCluster("emulated:h100", 4, spare=0)
    cluster.popularity[:, : SIZES.num_experts // 4] *= 1.5  # of worker 0, in every layer
    cluster.popularity /= cluster.popularity.sum(axis=1, keepdims=True)
    cluster.iterate()
    before = cluster.busy
    await cluster.settle()
    shares = [cluster.steering.state.home_share[rank] for rank in range(4)]
    assert shares[0] < 0.9 * min(shares[1:])
    assert cluster.busy.max() < 0.95 * before.max()
    assert cluster.busy.max() / cluster.busy.min() < 1.05 < before.max() / before.min()
    assert (cluster.steering.state.num_plans, cluster.sent) == (0, [])


async def test_replicas_level_hot_experts_and_then_nothing_changes() -> None:
    cluster = ModelledCluster("emulated:h100,sigma=1.25", 4)
    await cluster.settle()
    levels = [cluster.pairs_at(rank) for rank in range(4)]
    assert max(levels) < 1.1 * min(levels)
    plans, shares = cluster.steering.state.num_plans, dict(cluster.steering.state.home_share)
    assert plans >= 1
    await cluster.settle(4)
    assert cluster.steering.state.num_plans == plans
    assert cluster.steering.state.home_share == pytest.approx(shares, rel=0.1)


async def test_a_barrier_levels_attention_alone() -> None:
    cluster = ModelledCluster("emulated:h100,sigma=1.25", 4, "lockstep", spare=0)
    await cluster.settle(4)
    assert cluster.steering.state.home_share == dict.fromkeys(range(4), 0.25)
    cluster = ModelledCluster("emulated:h100,straggler=0:1.5", 4, "lockstep", spare=0)
    await cluster.settle()
    assert cluster.steering.state.home_share[0] < 0.2


async def test_nothing_is_planned_from_nothing() -> None:
    cluster = ModelledCluster("emulated:h100", 2)
    await cluster.steering.steer()
    for stats in cluster.stats:
        cluster.steering.observe(stats)
    await cluster.steering.steer()
    assert cluster.told == []


async def test_what_is_long_ago_is_forgotten() -> None:
    """Worker 0 was slow once, and is no more."""
    cluster = ModelledCluster("emulated:h100,straggler=0:2", 2, spare=0)
    await cluster.settle(4)
    slow = cluster.steering.state
    assert slow.owner_speed[0] < 0.8 * slow.owner_speed[1]
    cluster.costs[0] = cluster.costs[1]
    await cluster.settle()
    assert cluster.steering.state.owner_speed[0] == pytest.approx(1, rel=0.05)
    assert cluster.steering.state.home_share[0] == pytest.approx(0.5, rel=0.1)


def fast_tokens(rank: int, slowness: float) -> WorkerStats:
    """Of a worker that has computed a lot."""
    attention = HistogramSnapshot("attention", 0, [0] * len(BATCH_SIZE_EDGES) + [100], 10_000.0)
    return WorkerStats(
        rank,
        "colocated",
        num_waves=2,
        home_s=slowness,
        experts_s=slowness,
        expert_work=10_000,
        expert_pairs=[[9_000, 9_000]],
        batch_sizes=[attention],
    )


async def test_admission_follows_heartbeats(tmp_path: Path) -> None:
    engine, workers = make_engine(make_tokenizer(tmp_path), num_workers=2, max_num_seqs=64)
    for worker in workers:
        worker.runs.clear()
    try:
        for worker, slowness in zip(workers, (1.0, 3.0), strict=True):
            worker.stats = fast_tokens(worker.stats.rank, slowness)
            worker.beat()
        while len(engine.metrics.workers) < 2:  # noqa: ASYNC110 - the event loop of a test has nothing else to do
            await asyncio.sleep(0)
        for _ in range(10):
            await engine._steering.steer()
        # Different prompts: those of one would stay together, as its choices.
        engine.start([([5, 6 + index], SamplingParams(max_tokens=4)) for index in range(40)])
        counts = [len(worker.requests) for worker in workers]
        assert counts[0] > 2 * counts[1] > 0
        assert 'amoe:owner_speed{worker="1"} 0.5' in engine.metrics.render().decode()
    finally:
        await engine.close()


@pytest.mark.parametrize(
    ("interval_s", "placement"), [(0.0, PlacementConfig(colocated=2)), (1e-3, PlacementConfig(expert_workers=2))]
)
async def test_it_does_not_run_where_there_is_nothing_to_steer(interval_s: float, placement: PlacementConfig) -> None:
    config = EngineConfig(model="m", placement=placement, steering=SteeringConfig(interval_s=interval_s))
    await Steering(config, None, ManualClock(), send=lambda rank, message: None).run()


def topology_of(owners: np.ndarray, version: int, incarnations: list[int]) -> Topology:
    table = np.ascontiguousarray(owners, "<i2").tobytes()
    return Topology(version, incarnations, [""] * len(incarnations), table, owners.shape[-1])


def shares_of(message: Steer, owners: np.ndarray) -> np.ndarray:
    return np.frombuffer(message.shares, "<f4").reshape(owners.shape)


async def test_shares_follow_the_table_in_force() -> None:
    """Replicas come that nobody had before; then an owner goes, and the others share what it had."""
    cluster = ModelledCluster("emulated:h100,sigma=1.25", 4, spare=0)
    cluster.iterate()
    await cluster.steering.steer()
    assert cluster.sent == []
    wide = replicate_experts(cluster.popularity, 4, SIZES.num_experts // 4 + 4)
    cluster.steering.set_topology(topology_of(wide, 7, [0, 0, 0, 0]))
    await cluster.steering.steer()
    assert [(rank, message.version) for rank, message in cluster.sent] == [(rank, 7) for rank in range(4)]
    assert shares_of(cluster.sent[0][1], wide)[..., 1:].sum() > 0
    cluster.sent.clear()
    cluster.steering.set_topology(topology_of(wide, 8, [0, -1, 0, 0]))
    await cluster.steering.steer()
    assert [(rank, message.version) for rank, message in cluster.sent] == [(rank, 8) for rank in (0, 2, 3)]
    shares = shares_of(cluster.sent[0][1], wide)
    somebody_is_there = ((wide != 1) & (wide >= 0)).any(axis=-1)
    assert not shares[wide == 1].reshape(-1)[somebody_is_there[(wide == 1).any(axis=-1)]].any()
    assert shares[somebody_is_there].sum(axis=-1) == pytest.approx(1.0)
    replicas = ReplicaShares(wide, 0, 4, np.array([True, False, True, True]))
    replicas.set(shares)  # a home can do as it is told
    assert (replicas.choose(0, np.arange(SIZES.num_experts)[:, None]) != 1).all()
    assert list(cluster.steering.state.owner_speed) == [0, 2, 3]


async def test_a_plan_for_another_table_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = ModelledCluster("emulated:h100,sigma=1.25", 4)
    cluster.iterate()
    planned = steering.plan_replicas

    def plan(*args):
        cluster.steering._replicas = steering._Replicas(cluster.owners, np.ones(4, np.bool_))  # as a topology does
        return planned(*args)

    monkeypatch.setattr(steering, "plan_replicas", plan)
    await cluster.steering.steer()
    assert cluster.sent == []


async def test_a_plan_follows_a_new_topology_at_once() -> None:
    cluster = ModelledCluster("emulated:h100,sigma=1.25", 4)
    cluster.iterate()
    cluster.steering._interval_s = 1e6
    task = asyncio.create_task(cluster.steering.run())
    cluster.steering.set_topology(topology_of(cluster.owners, 3, [0, 0, 0, 1]))
    while not cluster.sent:  # noqa: ASYNC110 - the event loop of a test has nothing else to do
        await asyncio.sleep(0.001)
    assert {message.version for _, message in cluster.sent} == {3}
    task.cancel()


async def test_who_is_gone_is_forgotten_but_for_what_was_hot() -> None:
    cluster = ModelledCluster("emulated:h100,straggler=2:2", 4, spare=0)
    for _ in range(3):
        cluster.iterate()
    before = cluster.steering._meters.measured()
    load = cluster.steering.measured_load()
    cluster.steering.set_topology(topology_of(cluster.owners, 1, [0, 0, -1, 0]))
    cluster.steering.observe(cluster.stats[2])  # it was on its way
    after = cluster.steering._meters.measured()
    assert np.array_equal(before.pairs, after.pairs)
    assert np.array_equal(load, cluster.steering.measured_load())
    assert after.work.tolist() == [*before.work[:2], 0.0, before.work[3]]
    await cluster.steering.steer()
    assert 2 not in cluster.steering.state.owner_speed
    # The next life counts from zero.
    cluster.steering.set_topology(topology_of(cluster.owners, 2, [0, 0, 1, 0]))
    cluster.stats[2] = replace(cluster.stats[0], rank=2, experts_s=1.0, home_s=1.0, expert_work=7)
    cluster.steering.observe(cluster.stats[2])
    assert cluster.steering._meters.measured().work[2] == 7


async def test_the_load_of_experts_is_known_once_something_was_computed() -> None:
    cluster = ModelledCluster("emulated:h100,sigma=1.25", 2, spare=0)
    assert cluster.steering.measured_load() is None
    for _ in range(4):
        cluster.iterate()
    load = cluster.steering.measured_load()
    assert load.shape == (SIZES.num_layers, SIZES.num_experts)
    assert load / load.sum(axis=1, keepdims=True) == pytest.approx(cluster.popularity, rel=0.02, abs=1e-4)


def test_workers_that_may_come_later_have_their_places() -> None:
    config = EngineConfig(model="m", placement=PlacementConfig(expert_workers=2, max_expert_workers=4))
    steered = Steering(config, place_experts(1, 2, 2), ManualClock(), send=lambda rank, message: None)
    assert list(steered.state.owner_speed) == [1, 2]
    steered.observe(WorkerStats(3, "experts", experts_s=1.0, expert_pairs=[[5, 6]]))  # it has not joined
    assert steered.measured_load() is None
    owners = np.array([[[0, 2], [1, -1]]], np.int16)
    steered.set_topology(topology_of(owners, 1, [0, 0, 0, 0, -1]))
    steered.observe(WorkerStats(3, "experts", experts_s=1.0, expert_pairs=[[5, 6]]))
    assert steered.measured_load().tolist() == [[5.0, 6.0]]
    assert list(steered.state.owner_speed) == [1, 2, 3]

"""Transitions of experts, with workers that a script plays and the real board: nobody is ever sent to who does not hold
what is asked of him, and whoever dies, nothing hangs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from amoe.cluster import orders, placement_manager
from amoe.cluster.placement_manager import PlacementManager
from amoe.cluster.topology import NOBODY, TopologyBoard
from amoe.config import EngineConfig, PlacementConfig, SteeringConfig
from amoe.engine.messages import HoldExperts, Holding, LayerHeld, Topology
from amoe.errors import ConfigError
from amoe.policy.placement import experts_of, place_experts
from amoe.policy.rebalance import copies_at, hottest

SPARSE = (True, False, True)
NUM_EXPERTS = 8
HOME = 0


class Cluster:
    """One home, three expert workers and two spare places; each does what it is told, at the next turn of the loop.

    Attributes:
        holds: by rank, what each holds in truth.
        hooks: by rank, called instead of obeying an order at once; obeys if it returns True.
    """

    def __init__(self, rebalance_interval_s: float = 0.0) -> None:
        self.config = EngineConfig(
            model="m",
            placement=PlacementConfig(expert_workers=3, max_expert_workers=5),
            steering=SteeringConfig(rebalance_interval_s=rebalance_interval_s),
        )
        placement = self.config.placement
        self.ranks = placement.owner_ranks
        owners = place_experts(len(SPARSE), NUM_EXPERTS, 3)
        self.board = TopologyBoard(placement.num_ranks, owners, self.send)
        self.board.join(dict.fromkeys(range(placement.num_workers), (0, "")))
        self.holds: dict[int, list[list[int]]] = {}
        for rank in placement.expert_ranks:
            self.start(rank)
        self.orders: list[tuple[int, HoldExperts]] = []
        self.hooks: dict[int, Callable[[HoldExperts], bool]] = {}
        self.load: np.ndarray | None = None
        self.speeds = np.ones(len(self.ranks))
        shape: Any = SimpleNamespace(sparse_layers=SPARSE)
        self.manager = PlacementManager(
            self.board,
            shape,
            self.config,
            send=self.send,
            measured_load=lambda: self.load,
            measured_speeds=lambda: self.speeds,
            title=lambda rank: f"expert {rank - 1}",
        )
        self.board.observers.append(self.check)

    def start(self, rank: int) -> None:
        """A worker holds what the table in force gives it."""
        held = experts_of(self.board.owners, self.ranks.index(rank), SPARSE)
        self.holds[rank] = [list(held.get(layer, ())) for layer in range(len(SPARSE))]

    def send(self, rank: int, message: Topology | HoldExperts) -> None:
        loop = asyncio.get_running_loop()
        incarnation = self.board.incarnations[rank]
        if isinstance(message, Topology):
            loop.call_soon(self.apply, rank, incarnation, message)
            return
        self.orders.append((rank, message))
        loop.call_soon(self.obey, rank, incarnation, message)

    def apply(self, rank: int, incarnation: int, topology: Topology) -> None:
        if self.board.incarnations[rank] == incarnation:
            self.board.on_applied(rank, topology.version)

    def obey(self, rank: int, incarnation: int, message: HoldExperts) -> None:
        hook = self.hooks.get(rank, lambda message: True)
        if self.board.incarnations[rank] == incarnation and hook(message):
            self.holds[rank] = message.experts
            self.manager.orders.on_holding(rank, Holding(message.order, 0))

    def check(self, topology: Topology) -> None:
        """Every worker that serves holds all that the table gives it, at the very moment that the table is told."""
        for owner, rank in enumerate(self.ranks):
            if topology.incarnations[rank] == NOBODY:
                continue
            for layer, experts in experts_of(self.board.owners, owner, SPARSE).items():
                assert set(experts) <= set(self.holds[rank][layer]), (rank, layer)

    def join(self, rank: int, incarnation: int = 0) -> None:
        self.start(rank)
        self.board.join({rank: (incarnation, "")})

    def held(self, rank: int) -> int:
        return sum(len(experts) for experts in self.holds[rank])

    def check_settled(self) -> None:
        """Everybody holds what the table says, and nothing else; everything is somewhere."""
        for owner, rank in enumerate(self.ranks):
            if self.board.incarnations[rank] != NOBODY:
                given = experts_of(self.board.owners, owner, SPARSE)
                assert self.holds[rank] == [list(given.get(layer, ())) for layer in range(len(SPARSE))], rank
        assert self.manager.missing == 0
        assert self.manager.action == ""


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def finish(action: asyncio.Task[None]) -> None:
    await asyncio.wait_for(action, 10)
    await settle()


def shares(cluster: Cluster) -> list[int]:
    return copies_at(cluster.board.owners, len(cluster.ranks))[0].sum(axis=0).tolist()


async def test_a_newcomer_gets_its_share_and_gives_it_back() -> None:
    cluster = Cluster()
    cluster.join(4)
    await cluster.manager.take_in(4)
    await settle()
    assert shares(cluster) == [2, 2, 2, 2, 0]
    cluster.check_settled()
    assert cluster.manager.num_moved == 4  # two in each of two sparse layers
    await cluster.manager.empty(4)
    await settle()
    assert sorted(shares(cluster)) == [0, 0, 2, 3, 3]
    assert cluster.held(4) == 4, "who is about to be stopped is not told to forget"
    cluster.board.leave(4)
    cluster.check_settled()


async def test_the_weights_are_there_before_the_traffic_and_go_after_it() -> None:
    cluster = Cluster()
    cluster.join(4)
    seen: list[str] = []
    cluster.hooks = {
        rank: lambda message, rank=rank: not seen.append(f"order {rank} at {cluster.board.version}")
        for rank in cluster.ranks
    }
    cluster.board.observers.append(lambda topology: seen.append(f"table {topology.version}"))
    version = cluster.board.version
    await cluster.manager.take_in(4)
    await settle()
    assert seen[0] == f"order 4 at {version}"
    assert seen[1] == f"table {version + 1}"
    assert sorted(seen[2:]) == [f"order {rank} at {version + 1}" for rank in (1, 2, 4)]


async def test_a_rebalance_follows_the_load_and_needs_one() -> None:
    cluster = Cluster()
    with pytest.raises(ConfigError, match="no load has been measured yet"):
        await cluster.manager.rebalance()
    cluster.load = np.ones((len(SPARSE), NUM_EXPERTS))
    cluster.load[:, :3] = 10.0  # all at the first worker
    present = np.array([True, True, True, False, False])
    before = hottest(cluster.load, cluster.board.owners, present)
    await cluster.manager.rebalance()
    await settle()
    assert hottest(cluster.load, cluster.board.owners, present) < 0.7 * before
    cluster.check_settled()
    version = cluster.board.version
    await cluster.manager.rebalance()
    assert cluster.board.version == version, "nothing to do"


async def test_a_rebalance_relieves_who_is_slow() -> None:
    """Each holds as much of a load that is the same for all experts; then one is found to be four times slower."""
    cluster = Cluster()
    cluster.load = np.ones((len(SPARSE), NUM_EXPERTS))
    cluster.speeds[1] = 0.25
    await cluster.manager.rebalance()
    await settle()
    holds = copies_at(cluster.board.owners, len(cluster.ranks))[np.array(SPARSE)].sum(axis=1)
    assert (holds[:, 1] == 1).all() and (holds[:, [0, 2]] >= 3).all()
    cluster.check_settled()


async def test_replicas_by_name() -> None:
    cluster = Cluster()
    await cluster.manager.replicate(2, 5, 3)
    await settle()
    assert cluster.manager.num_replicas == 2
    cluster.check_settled()
    await cluster.manager.replicate(2, 5, 1)
    await settle()
    assert cluster.manager.num_replicas == 0
    cluster.check_settled()
    for layer, expert, count, message in (
        (1, 0, 2, "layer 1 has no experts: it is a dense one"),
        (3, 0, 2, "layer 3 does not exist"),
        (0, 8, 2, "expert 8 does not exist"),
        (0, 0, 4, "1 to 3 copies"),
    ):
        with pytest.raises(ConfigError, match=message):
            await cluster.manager.replicate(layer, expert, count)


async def test_the_last_worker_stays_and_who_is_not_there_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster()
    await cluster.manager.empty(1)
    await cluster.manager.empty(2)
    with pytest.raises(ConfigError, match="expert 2 is the last one that holds experts"):
        await cluster.manager.empty(3)
    monkeypatch.setattr(placement_manager, "PATIENCE_S", 0.01)
    with pytest.raises(ConfigError, match="expert 3 does not come up"):
        await cluster.manager.take_in(4)
    with pytest.raises(ConfigError, match="expert 4 is not there to hold experts"):
        await cluster.manager.move_to(np.full((len(SPARSE), NUM_EXPERTS, 1), 4, np.int16))
    cluster.board.leave(1)
    cluster.board.leave(2)
    cluster.check_settled()


async def test_a_worker_that_cannot_hold_them_is_told_of_and_nothing_has_changed() -> None:
    cluster = Cluster()
    cluster.join(4)
    before = cluster.board.owners

    def refuse(message: HoldExperts) -> bool:
        asyncio.get_running_loop().call_soon(
            cluster.manager.orders.on_holding, 4, Holding(message.order, 0, "out of memory")
        )
        return False

    cluster.hooks[4] = refuse
    with pytest.raises(ConfigError, match="expert 3 cannot hold its experts: out of memory"):
        await cluster.manager.take_in(4)
    assert cluster.board.owners is before
    cluster.board.leave(4)
    cluster.load = np.ones((len(SPARSE), NUM_EXPERTS))
    await cluster.manager.rebalance()  # nobody waits for a worker that was not taken in
    cluster.check_settled()


@pytest.mark.parametrize("victim", [1, 4])
async def test_a_worker_dies_while_experts_move_and_comes_back(victim: int) -> None:
    """Worker 4, a newcomer, and worker 1, which gives it experts: in the middle of loading."""
    cluster = Cluster()
    cluster.join(4)
    died = asyncio.Event()

    def die(message: HoldExperts) -> bool:
        if not died.is_set():
            died.set()
            cluster.board.leave(victim)
            return victim != 4
        return True

    cluster.hooks[4] = die
    action = asyncio.create_task(cluster.manager.take_in(4))
    await asyncio.wait_for(died.wait(), 10)
    await settle()
    cluster.join(victim, incarnation=1)
    await finish(action)
    assert shares(cluster) == [2, 2, 2, 2, 0]
    cluster.check_settled()


async def test_whoever_dies_again_and_again_is_given_up() -> None:
    cluster = Cluster()
    cluster.join(4)
    lives = iter(range(1, 100))

    def die(message: HoldExperts) -> bool:
        if any(message.experts):
            cluster.board.leave(4)
            cluster.join(4, incarnation=next(lives))
        return True

    cluster.hooks[4] = die
    with pytest.raises(ConfigError, match="workers die again and again"):
        await asyncio.wait_for(cluster.manager.take_in(4), 10)
    assert shares(cluster)[3] == 0


async def test_an_emptied_worker_may_be_dead_already() -> None:
    cluster = Cluster()
    cluster.board.leave(3)
    assert cluster.manager.missing == 4
    await cluster.manager.empty(3)
    await settle()
    assert shares(cluster)[2] == 0
    cluster.check_settled()


async def test_a_worker_that_started_by_an_older_table_is_told() -> None:
    cluster = Cluster()
    cluster.board.leave(1)
    cluster.start(1)  # it reads its experts
    cluster.manager._members[0] = False  # meanwhile the others have taken some
    await cluster.manager.empty(2)
    await settle()
    held = cluster.holds[1]
    cluster.board.observers.remove(cluster.check)
    cluster.board.join({1: (1, "")})
    await settle()
    assert cluster.holds[1] != held
    given = experts_of(cluster.board.owners, 0, SPARSE)
    assert cluster.holds[1] == [list(given.get(layer, ())) for layer in range(len(SPARSE))]


async def test_one_transition_at_a_time_and_progress_is_told() -> None:
    cluster = Cluster()
    cluster.join(4)
    held_up: list[HoldExperts] = []
    cluster.hooks[4] = lambda message: bool(held_up.append(message))
    first = asyncio.create_task(cluster.manager.take_in(4))
    second = asyncio.create_task(cluster.manager.replicate(0, 0, 2))
    while not held_up:  # noqa: ASYNC110 - the event loop of a test has nothing else to do
        await asyncio.sleep(0)
    assert cluster.manager.action == "moving 0 of 4 experts"
    cluster.manager.orders.on_layer_held(4, LayerHeld(held_up[0].order))
    assert cluster.manager.action == "moving 2 of 4 experts"
    cluster.manager.orders.on_layer_held(4, LayerHeld(held_up[0].order - 1))
    cluster.manager.orders.on_layer_held(3, LayerHeld(held_up[0].order))
    assert cluster.manager.action == "moving 2 of 4 experts"
    version = cluster.board.version
    await settle()
    assert cluster.board.version == version
    del cluster.hooks[4]
    cluster.obey(4, 0, held_up[0])
    await asyncio.wait_for(first, 10)
    await finish(second)
    assert cluster.manager.num_replicas == 1
    cluster.check_settled()


async def test_a_home_that_never_routes_anew_ends_no_wait_but_its_own() -> None:
    cluster = Cluster()
    cluster.join(4)
    stuck = cluster.apply
    cluster.apply = lambda rank, incarnation, topology: None if rank == HOME else stuck(rank, incarnation, topology)  # type: ignore[method-assign]
    action = asyncio.create_task(cluster.manager.take_in(4))
    while shares(cluster)[3] == 0:  # noqa: ASYNC110 - the event loop of a test has nothing else to do
        await asyncio.sleep(0)
    await settle()
    assert not action.done()
    assert any(len(experts) == 3 for experts in cluster.holds[1]), "nothing is forgotten yet"
    cluster.board.leave(HOME)  # the supervisor has ended it
    await finish(action)
    cluster.check_settled()


async def test_a_worker_that_does_not_get_on_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lives, and never answers: the action fails, the table is what it was, and others may follow."""
    monkeypatch.setattr(orders, "STANDSTILL_S", 0.02)
    cluster = Cluster()
    cluster.join(4)
    before, stuck = cluster.board.owners, list[HoldExperts]()
    cluster.hooks[4] = lambda message: bool(stuck.append(message))
    with pytest.raises(ConfigError, match=r"expert 3 has not got on with loading .* no expert has moved"):
        await cluster.manager.take_in(4)
    assert cluster.board.owners is before
    cluster.manager.orders.on_holding(4, Holding(stuck[0].order, 0))  # too late
    monkeypatch.undo()
    del cluster.hooks[4]
    await cluster.manager.replicate(0, 0, 2)
    cluster.obey(4, 0, stuck[0])  # later still
    await cluster.manager.replicate(0, 0, 1)
    await settle()
    assert shares(cluster)[3] == 0
    cluster.board.leave(4)
    cluster.check_settled()


async def test_a_home_that_does_not_follow_keeps_what_is_old_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement_manager, "STANDSTILL_S", 0.02)
    cluster = Cluster()
    cluster.join(4)
    apply = cluster.apply
    cluster.apply = lambda rank, incarnation, topology: None if rank == HOME else apply(rank, incarnation, topology)  # type: ignore[method-assign]
    await cluster.manager.take_in(4)
    await settle()
    assert shares(cluster) == [2, 2, 2, 2, 0]
    assert cluster.held(1) > 4, "its tokens may still go there"
    with pytest.raises(ConfigError, match="expert 3 stays: expert -1 has not changed its routing"):
        await cluster.manager.empty(4)
    cluster.apply = apply  # type: ignore[method-assign]
    cluster.load = np.ones((len(SPARSE), NUM_EXPERTS))
    await cluster.manager.rebalance()
    await settle()
    cluster.check_settled()


@pytest.mark.parametrize("victim", [1, 4])
async def test_a_worker_dies_while_it_is_planned(victim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets nothing, and is missed: who keeps what it has, and who was to get something."""
    monkeypatch.setattr(placement_manager, "PATIENCE_S", 0.02)
    cluster = Cluster()
    cluster.join(4)
    await cluster.manager.take_in(4)
    cluster.load = np.ones((len(SPARSE), NUM_EXPERTS))
    cluster.load[:, :3] = 10.0
    plan = cluster.manager._plan

    async def slow_plan(what: Any, present: np.ndarray) -> np.ndarray:
        target = await plan(what, present)
        if victim in cluster.board.present:
            cluster.board.leave(victim)
        return target

    monkeypatch.setattr(cluster.manager, "_plan", slow_plan)
    await cluster.manager.rebalance()
    await settle()
    assert shares(cluster)[cluster.ranks.index(victim)] == 0
    cluster.check_settled()

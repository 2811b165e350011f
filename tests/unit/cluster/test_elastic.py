"""Scaling a cluster of workers that are nothing but their handles; they carry out what they are told at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from amoe.cluster.elastic import ElasticCluster
from amoe.config import AutoscaleConfig, FailureConfig, PlacementConfig
from amoe.engine.messages import Applied, Heartbeat, HoldExperts, Holding, Topology, ToWorker
from amoe.errors import ConfigError, UnfinishedError
from amoe.policy.placement import place_experts
from amoe.stats import WorkerStats
from tests.unit.cluster.fake_cluster import Fakes, FakeWorker

SHAPE = cast(Any, SimpleNamespace(num_layers=2, num_experts=6, sparse_layers=(False, True)))
CALM = FailureConfig(timeout_s=600.0, backoff_s=0.01, max_backoff_s=600.0)


class Elastic(Fakes):
    """`Fakes` whose workers answer, and an `ElasticCluster` over them.

    Attributes:
        refuses: ranks that cannot load experts.
        immortal: ranks whose next lives cannot be killed.
        held: by rank, the experts of layer 1 that were ordered last.
    """

    def __init__(self) -> None:
        super().__init__(CALM)
        self.refuses: set[int] = set()
        self.immortal: set[int] = set()
        self.held: dict[int, list[int]] = {}
        self.board.owners = place_experts(2, 6, 2)
        cast(Any, self.engine).measured_load = lambda: None
        cast(Any, self.engine).measured_speeds = lambda: np.ones(len(self.cluster.config.placement.owner_ranks))
        self.engine.metrics.experts_moved = lambda count: self.events.append(f"moved {count}")
        self.admin = ElasticCluster(self.cluster, cast(Any, self.engine), self.board, self.supervisor, SHAPE)

    async def launch(self, rank: int, *args: Any, **kwargs: Any) -> Any:
        worker = cast(FakeWorker, await super().launch(rank, *args, **kwargs))
        worker.is_immortal = rank in self.immortal
        take = worker.channel.send

        def answer(message: ToWorker) -> None:
            take(message)
            asyncio.get_running_loop().call_soon(self._answer, worker, message)

        worker.channel.send = answer
        return worker

    def _answer(self, worker: FakeWorker, message: ToWorker) -> None:
        rank, hear = worker.rank, self.engine.on_message
        if worker.exited.is_set() or hear is None:
            return
        if isinstance(message, Topology):
            hear(rank, Applied(message.version))
            for _ in range(2):
                hear(rank, Heartbeat(WorkerStats(rank, "experts", 0, 0.0, 0)))
        elif isinstance(message, HoldExperts):
            complaint = "no memory" if rank in self.refuses else ""
            if not complaint:
                self.held[rank] = message.experts[1]
            hear(rank, Holding(message.order, 0, complaint))

    def owned(self) -> dict[int, list[int]]:
        """Experts of layer 1 by the rank that homes send them to."""
        ranks = self.config.placement.owner_ranks
        owners = self.board.owners[1]
        return {rank: np.flatnonzero((owners == owner).any(axis=-1)).tolist() for owner, rank in enumerate(ranks)}


@pytest.fixture
async def elastic(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Elastic]:
    monkeypatch.setattr("amoe.cluster.elastic.EMPTY_TIMEOUT_S", 0.05)  # heartbeats come with topologies only
    async with Elastic() as elastic:
        elastic.admin.run()
        yield elastic
        await elastic.admin.close()


async def test_one_more_gets_its_share_and_one_less_leaves_it_to_the_others(elastic: Elastic) -> None:
    status = await elastic.admin.scale_experts(3)
    assert (status.num_expert_workers, status.max_expert_workers, status.missing, status.action) == (3, 3, 0, "")
    assert [len(experts) for experts in elastic.owned().values()] == [2, 2, 2]
    assert set(elastic.held[3]) >= set(elastic.owned()[3])
    status = await elastic.admin.scale_experts(1)
    assert [worker.title for worker in status.workers] == ["attention 0", "expert 0"]
    assert elastic.owned() == {1: [0, 1, 2, 3, 4, 5], 2: [], 3: []}
    assert elastic.held[1] == [0, 1, 2, 3, 4, 5]
    assert [event for event in elastic.events if event.startswith("removed")] == ["removed 3", "removed 2"]
    assert "lost 3 exit" not in elastic.events


async def test_nothing_to_do(elastic: Elastic) -> None:
    version = elastic.board.version
    status = await elastic.admin.scale_experts(2)
    assert (status.num_expert_workers, status.version) == (2, version)


@pytest.mark.parametrize("count", [0, -1, 4])
async def test_counts_that_cannot_be(elastic: Elastic, count: int) -> None:
    with pytest.raises(ConfigError, match=f"1 to 3 expert workers, not {count}: --max-expert-workers"):
        await elastic.admin.scale_experts(count)


@pytest.mark.parametrize(("count", "least", "most"), [(1, 2, 3), (3, 1, 2)])
async def test_what_the_autoscaler_would_undo_is_refused(elastic: Elastic, count: int, least: int, most: int) -> None:
    autoscale = AutoscaleConfig(min_workers=least, max_workers=most)
    elastic.cluster.config = replace(elastic.cluster.config, autoscale=autoscale)
    with pytest.raises(
        ConfigError, match=f"--autoscale-experts {least}:{most} of this server would take {count} expert"
    ):
        await elastic.admin.scale_experts(count)


async def test_workers_that_hold_attention_too_stay(elastic: Elastic) -> None:
    elastic.admin._placement = PlacementConfig(colocated=2)
    with pytest.raises(ConfigError, match="--expert-workers"):
        await elastic.admin.scale_experts(1)


async def test_one_that_cannot_start_is_told_and_leaves_nothing(elastic: Elastic) -> None:
    elastic.scripts[3].append(ConfigError("no room"))
    with pytest.raises(
        UnfinishedError, match="expert 2 could not be started: no room; 2 of 3 expert workers serve; ask"
    ):
        await elastic.admin.scale_experts(3)
    assert elastic.admin.status().num_expert_workers == 2
    assert (await elastic.admin.scale_experts(3)).num_expert_workers == 3  # it works the next time


async def test_the_others_join_if_one_cannot_start(elastic: Elastic) -> None:
    await elastic.admin.scale_experts(1)
    elastic.scripts[3].append(ConfigError("killed by SIGKILL"))
    with pytest.raises(UnfinishedError, match="expert 2 could not be started: killed by SIGKILL; 2 of 3") as caught:
        await elastic.admin.scale_experts(3)
    assert not isinstance(caught.value, ConfigError), "it is no mistake of whoever asked"
    assert [len(experts) for experts in elastic.owned().values()] == [3, 3, 0]


async def test_one_that_cannot_hold_its_share_leaves_again(elastic: Elastic) -> None:
    elastic.refuses.add(3)
    with pytest.raises(UnfinishedError, match="expert 2 cannot hold its experts: no memory; 2 of 3"):
        await elastic.admin.scale_experts(3)
    assert elastic.supervisor.ranks == {0, 1, 2}
    assert elastic.owned()[3] == []


async def test_one_that_can_neither_hold_its_share_nor_be_killed(
    elastic: Elastic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its storage hangs. The next one joins all the same; and nobody says that there are as many as asked for."""
    monkeypatch.setattr("amoe.cluster.supervisor.LEAVE_GRACE_S", 0.0)
    monkeypatch.setattr("amoe.cluster.supervisor.BURIAL_PATIENCE_S", 0.01)
    await elastic.admin.scale_experts(1)
    elastic.refuses.add(2)
    elastic.immortal.add(2)
    with pytest.raises(UnfinishedError, match=r"expert 1 does not end although it was killed.*2 of 3 expert workers"):
        await elastic.admin.scale_experts(3)
    assert {rank: len(experts) for rank, experts in elastic.owned().items()} == {1: 3, 2: 0, 3: 3}
    with pytest.raises(UnfinishedError, match="no place for 1 more: expert 1 has not ended yet"):
        await elastic.admin.scale_experts(3)
    elastic.worker(2).die("was killed at last")
    await elastic.until_holds(lambda: 2 not in elastic.supervisor.ranks)
    elastic.refuses.clear()
    elastic.immortal.clear()
    assert (await elastic.admin.scale_experts(3)).num_expert_workers == 3


async def test_one_whose_experts_nobody_can_take_stays(elastic: Elastic) -> None:
    elastic.refuses.add(1)
    before = elastic.owned()
    with pytest.raises(
        UnfinishedError, match="expert 0 cannot hold its experts: no memory; 2 expert workers serve, not 1"
    ):
        await elastic.admin.scale_experts(1)
    assert elastic.owned() == before
    assert [worker.state for worker in elastic.admin.status().workers] == ["serving"] * 3


async def test_one_that_dies_while_it_is_drained_is_not_missed(elastic: Elastic) -> None:
    scaling = asyncio.create_task(elastic.admin.scale_experts(1))
    await elastic.until_holds(lambda: elastic.admin.status().workers[2].state == "draining")
    elastic.worker(2).die("was killed by SIGKILL")
    status = await scaling
    assert (status.num_expert_workers, status.missing) == (1, 0)
    assert "launch 2.1" not in elastic.events


async def test_a_replica_is_there_and_counted(elastic: Elastic) -> None:
    status = await elastic.admin.replicate(1, 5, 2)
    assert status.num_replicas == 1
    assert all(5 in experts for experts in (elastic.owned()[1], elastic.owned()[2]))
    assert "moved 1" in elastic.events
    with pytest.raises(ConfigError, match="dense"):
        await elastic.admin.replicate(0, 1, 2)
    with pytest.raises(ConfigError, match="no load has been measured"):
        await elastic.admin.rebalance()

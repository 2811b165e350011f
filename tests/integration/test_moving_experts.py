"""Experts move between workers that serve, replicas come and go, workers join and leave: no token changes.

Real workers, models and cores in this process, see `tests/integration/elastic.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from amoe.config import PlacementConfig
from amoe.policy.rebalance import copies_at
from tests.integration.elastic import ELASTIC, ElasticCluster, skewed
from tests.integration.exactness import KERNELS, Case


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("moving")


@pytest.mark.parametrize(
    ("schedule", "variant", "kernels"), [(("waves", 2), 1, KERNELS[0]), (("progress", 1), 0, KERNELS[-1])], ids=str
)
async def test_scaling_and_rebalancing_change_no_token(
    schedule: tuple[str, int], variant: int, kernels: str, root: Path
) -> None:
    """Two workers become four and three again; replicas come and go; all while tokens of every layer are under way."""
    cluster = ElasticCluster(Case(*schedule, "qwen3_moe", "2A2E", "plain", variant, kernels=kernels), root, ELASTIC)
    manager = cluster.manager

    async def script() -> None:
        cluster.start(4)
        await manager.take_in(4)
        cluster.load = skewed(cluster, 1)
        await manager.rebalance()
        await manager.replicate(0, 3, 3)
        cluster.start(5)
        await manager.take_in(5)
        await manager.empty(2)
        await cluster.drained(2)
        cluster.kill(2)
        cluster.load = skewed(cluster, 2)
        await manager.rebalance()
        await manager.replicate(0, 3, 1)

    await cluster.serve_while(script())
    cluster.check()
    assert copies_at(cluster.board.owners, 4).any(axis=(0, 1)).tolist() == [False, True, True, True]
    assert manager.num_moved > 10
    assert cluster.losses() == [(0, 0), (0, 0)], "nobody had to ask twice"
    cluster.finish()


async def test_colocated_workers_exchange_experts_too(root: Path) -> None:
    case = Case("waves", 2, "qwen2_moe", "colocated2", "cached", 1)
    cluster = ElasticCluster(case, root, PlacementConfig(colocated=2))

    async def script() -> None:
        for seed in range(3):
            cluster.load = skewed(cluster, seed)
            await cluster.manager.rebalance()
            await cluster.manager.replicate(cluster.sparse.index(True), seed, 2)

    await cluster.serve_while(script())
    cluster.check()
    assert cluster.manager.num_moved > 3
    cluster.finish()


@pytest.mark.parametrize("victim", [2, 3, 4], ids=["giver", "bystander", "newcomer"])
async def test_a_worker_dies_while_experts_move(victim: int, root: Path) -> None:
    """At whatever moment of the transition: its next life has what it should have, and no token is lost."""
    cluster = ElasticCluster(Case("waves", 2, "qwen3_moe", "2A2E", "plain", 2), root, ELASTIC)
    lives = iter(range(1, 100))

    def killing(action: Callable[[], Awaitable[None]], after: int) -> Awaitable[None]:
        async def run() -> None:
            task = asyncio.ensure_future(action())
            for _ in range(after):
                await asyncio.sleep(0)
            cluster.kill(victim)
            for _ in range(3):
                await asyncio.sleep(0)
            cluster.start(victim, next(lives))
            await task

        return run()

    async def script() -> None:
        cluster.start(4)
        await killing(lambda: cluster.manager.take_in(4), after=5)
        for round_ in range(6):
            cluster.load = skewed(cluster, round_)
            await killing(cluster.manager.rebalance, after=4 * round_)

    await cluster.serve_while(script())
    cluster.check()
    cluster.finish()

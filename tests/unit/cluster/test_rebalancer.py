"""What happens to a placement without anybody asking: see `Rebalancer`."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import numpy as np
import pytest

from amoe.cluster import placement_manager, rebalancer
from amoe.cluster.rebalancer import Rebalancer
from amoe.engine.messages import HoldExperts
from tests.unit.cluster.test_placement_manager import NUM_EXPERTS, SPARSE, Cluster, finish, settle, shares


async def test_a_worker_dies_and_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its experts go to the others then; once it is back, it gets its share again."""
    monkeypatch.setattr(placement_manager, "PATIENCE_S", 0.02)
    cluster = Cluster()
    cluster.load = np.ones((len(SPARSE), NUM_EXPERTS))
    cluster.board.leave(2)
    assert cluster.manager.missing > 0
    action = asyncio.create_task(cluster.manager.rebalance())
    await settle()
    assert cluster.manager.action == "waiting for a worker that is being started"
    await finish(action)
    assert shares(cluster) == [4, 0, 4, 0, 0]
    cluster.check_settled()
    background = asyncio.create_task(Rebalancer(cluster.manager, 0.0).run())
    await settle()
    cluster.join(2, incarnation=1)
    while shares(cluster)[1] == 0:  # noqa: ASYNC110 - the event loop of a test has nothing else to do
        await asyncio.sleep(0.001)
    await settle()
    cluster.check_settled()
    background.cancel()


async def test_who_comes_back_while_the_others_take_its_experts_gets_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement_manager, "PATIENCE_S", 0.02)
    cluster = Cluster()
    cluster.load = np.ones((len(SPARSE), NUM_EXPERTS))
    background = asyncio.create_task(Rebalancer(cluster.manager, 0.0).run())
    cluster.board.leave(2)

    def come_back(message: HoldExperts) -> bool:
        if 2 not in cluster.board.present:
            cluster.join(2, incarnation=1)
        return True

    cluster.hooks[1] = come_back
    await cluster.manager.rebalance()
    while shares(cluster)[1] == 0:  # noqa: ASYNC110 - the event loop of a test has nothing else to do
        await asyncio.sleep(0.001)
    await settle()
    cluster.check_settled()
    background.cancel()


async def test_the_background_moves_only_for_a_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster()
    cluster.load = np.ones((len(SPARSE), NUM_EXPERTS))
    cluster.load[:, 0] = 1.1
    background = asyncio.create_task(Rebalancer(cluster.manager, 0.001).run())
    version = cluster.board.version
    await asyncio.sleep(0.02)
    cluster.load[:, :3] = 10.0  # too few pairs to say so
    await asyncio.sleep(0.02)
    assert cluster.board.version == version
    cluster.load *= 100
    while cluster.board.version == version:  # noqa: ASYNC110 - the event loop of a test has nothing else to do
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.02)
    cluster.check_settled()
    background.cancel()


async def test_who_stops_the_background_stops_all_of_it() -> None:
    cluster = Cluster()
    others = asyncio.all_tasks()
    background = asyncio.create_task(Rebalancer(cluster.manager, 0.0).run())
    await asyncio.sleep(0)
    background.cancel()
    await asyncio.gather(background, return_exceptions=True)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() <= others


async def test_who_comes_back_while_another_one_gets_its_share_gets_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement_manager, "PATIENCE_S", 0.02)
    cluster = Cluster()
    cluster.load = np.ones((len(SPARSE), NUM_EXPERTS))
    background = asyncio.create_task(Rebalancer(cluster.manager, 0.0).run())
    cluster.board.leave(2)
    cluster.board.leave(3)
    await cluster.manager.rebalance()
    await settle()
    assert shares(cluster)[1:3] == [0, 0]

    def come_back(message: HoldExperts) -> bool:
        if any(message.experts) and 3 not in cluster.board.present:
            cluster.join(3, incarnation=1)
        return True

    cluster.hooks[2] = come_back
    cluster.join(2, incarnation=1)
    while not all(shares(cluster)[:3]):  # noqa: ASYNC110 - the event loop of a test has nothing else to do
        await asyncio.sleep(0.001)
    await settle()
    cluster.check_settled()
    background.cancel()


async def test_an_error_of_ours_does_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster()
    cluster.load = np.full((len(SPARSE), NUM_EXPERTS), 1000.0)
    cluster.load[:, :3] = 10_000.0
    rebalance, calls = placement_manager.policy.rebalance, 0

    def fails_once(*args: Any) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ValueError("one bad number")
        return rebalance(*args)

    monkeypatch.setattr(placement_manager.policy, "rebalance", fails_once)
    background = asyncio.create_task(Rebalancer(cluster.manager, 0.001).run())
    version = cluster.board.version
    while cluster.board.version == version:  # noqa: ASYNC110 - the event loop of a test has nothing else to do
        await asyncio.sleep(0.001)
    assert calls > 1
    background.cancel()


async def test_it_tells_what_to_do_about_experts_that_nobody_holds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, and again after they were held. What it names works on a server that has measured nothing yet."""
    monkeypatch.setattr(rebalancer, "MISSING_S", 0.01)
    monkeypatch.setattr(placement_manager, "PATIENCE_S", 0.01)
    cluster = Cluster()
    background = asyncio.create_task(Rebalancer(cluster.manager, 0.0).run())
    with caplog.at_level(logging.ERROR):
        for told in (1, 2):
            cluster.board.leave(2)
            while len(caplog.records) < told:  # noqa: ASYNC110 - the event loop of a test has nothing else to do
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)
            assert len(caplog.records) == told
            assert f"{cluster.manager.missing} experts have been held by nobody" in caplog.text
            cluster.join(2, incarnation=told)
            await settle()
        cluster.board.leave(2)
        await finish(asyncio.create_task(cluster.manager.rebalance()))
        assert cluster.manager.missing == 0
    background.cancel()

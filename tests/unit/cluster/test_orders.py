"""Orders to hold experts: the last one counts, and nobody is waited for who does not get on."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from amoe.cluster import orders
from amoe.cluster.orders import ExpertOrders, Order
from amoe.cluster.topology import TopologyBoard
from amoe.engine.messages import HoldExperts, Holding, LayerHeld
from amoe.errors import ConfigError

OWNERS = np.zeros((1, 2, 1), np.int16)
RANK = 1


class Told:
    """A worker at rank 1 that writes down what it is told."""

    def __init__(self) -> None:
        self.orders: list[HoldExperts] = []
        self.board = TopologyBoard(2, OWNERS, lambda rank, message: None)
        self.board.join({RANK: (0, "")})
        self.given = ExpertOrders(
            self.board,
            [RANK],
            [True],
            send=lambda rank, order: self.orders.append(order),
            title=lambda rank: f"worker {rank}",
        )

    def start(self) -> tuple[Order, asyncio.Task[None]]:
        order = self.given.give(RANK, OWNERS)
        return order, asyncio.create_task(self.given.wait(RANK, order))


async def test_an_answer_ends_the_wait() -> None:
    told = Told()
    _, waiting = told.start()
    await asyncio.sleep(0)
    assert told.orders == [HoldExperts(1, [[0, 1]])]
    told.given.on_holding(RANK, Holding(7, 0))
    told.given.on_holding(0, Holding(1, 0))
    await asyncio.sleep(0)
    assert not waiting.done()
    told.given.on_holding(RANK, Holding(1, 0))
    await waiting
    told.given.on_holding(RANK, Holding(1, 0))


async def test_a_complaint_is_told() -> None:
    told = Told()
    _, waiting = told.start()
    told.given.on_holding(RANK, Holding(1, 0, "no memory"))
    with pytest.raises(ConfigError, match="worker 1 cannot hold its experts: no memory"):
        await waiting


async def test_who_is_gone_answers_nothing() -> None:
    told = Told()
    _, waiting = told.start()
    told.given.drop(RANK)
    await waiting
    told.board.leave(RANK)
    _, waiting = told.start()
    await waiting
    assert len(told.orders) == 1


async def test_each_layer_gives_the_full_time_again() -> None:
    told = Told()
    order, waiting = told.start()
    await asyncio.sleep(0)
    assert order.patience is not None
    ends = [order.patience.when()]
    for number in (1, 2, 1):  # only what is said of this order counts
        await asyncio.sleep(0.002)
        told.given.on_layer_held(RANK, LayerHeld(number))
        ends.append(order.patience.when())
    assert ends[0] < ends[1] == ends[2] < ends[3]
    told.given.on_holding(RANK, Holding(1, 0))
    await waiting
    told.given.on_layer_held(RANK, LayerHeld(1))


async def test_who_does_not_get_on_is_given_up_and_may_answer_later(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    monkeypatch.setattr(orders, "STANDSTILL_S", 0.01)
    _, waiting = told.start()
    with pytest.raises(ConfigError, match="worker 1 has not got on"):
        await waiting
    told.given.on_layer_held(RANK, LayerHeld(1))
    told.given.on_holding(RANK, Holding(1, 0))
    monkeypatch.undo()
    _, waiting = told.start()
    told.given.on_holding(RANK, Holding(1, 0))
    await asyncio.sleep(0)
    assert not waiting.done()
    told.given.on_holding(RANK, Holding(2, 0))
    await waiting

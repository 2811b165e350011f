"""Orders to workers to hold experts, and the waits for their answers: none is for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from amoe.cluster.topology import NOBODY, TopologyBoard
from amoe.engine.messages import HoldExperts, Holding, LayerHeld
from amoe.errors import ConfigError
from amoe.policy import rebalance as policy
from amoe.types import Int16Array

STANDSTILL_S = 300.0  # a worker that has not got on for so long, with one layer or with its routing, will not


@dataclass(slots=True)
class Order:
    """An order that may not have been carried out yet.

    Attributes:
        incarnation: of the worker that was asked; `NOBODY`: none was there.
        answer: None: the worker is gone.
        num_layers_held: layers that it has changed so far.
        patience: of who waits for the answer.
    """

    number: int
    incarnation: int
    answer: asyncio.Future[Holding | None]
    num_layers_held: int = 0
    patience: asyncio.Timeout | None = None


class ExpertOrders:
    """The last order of each worker. One that comes later replaces it: what is answered to an earlier one says nothing.

    Args:
        ranks: [D] that may hold experts.
        sparse_layers: of the model.
        send: takes an order to the worker of a rank; one that is gone must not make it raise.
        title: of the worker of a rank, for people.
    """

    def __init__(
        self,
        board: TopologyBoard,
        ranks: Sequence[int],
        sparse_layers: Sequence[bool],
        *,
        send: Callable[[int, HoldExperts], None],
        title: Callable[[int], str],
    ) -> None:
        self._board = board
        self._ranks = list(ranks)
        self._sparse = tuple(sparse_layers)
        self._send = send
        self._title = title
        self._orders: dict[int, Order] = {}
        self._count = 0

    def give(self, rank: int, owners: Int16Array) -> Order:
        """Let a worker hold what a table gives it."""
        self._count += 1
        answer: asyncio.Future[Holding | None] = asyncio.get_running_loop().create_future()
        order = Order(self._count, self._board.incarnations[rank], answer)
        if (former := self._orders.get(rank)) is not None and not former.answer.done():
            former.answer.cancel()
        self._orders[rank] = order
        if order.incarnation == NOBODY:
            answer.set_result(None)
        else:
            experts = policy.orders_for(owners, self._ranks.index(rank), self._sparse)
            self._send(rank, HoldExperts(order.number, experts))
        return order

    def on_holding(self, rank: int, message: Holding) -> None:
        """A worker has carried out an order, or says why it cannot."""
        order = self._orders.get(rank)
        if order is not None and order.number == message.order:
            del self._orders[rank]
            if not order.answer.done():
                order.answer.set_result(message)

    def on_layer_held(self, rank: int, message: LayerHeld) -> None:
        """A worker gets on with an order."""
        order = self._orders.get(rank)
        if order is None or order.number != message.order:
            return
        order.num_layers_held += 1
        if order.patience is not None and not order.patience.expired():
            order.patience.reschedule(asyncio.get_running_loop().time() + STANDSTILL_S)

    def drop(self, rank: int) -> None:
        """A worker is gone: it answers nothing any more."""
        if (order := self._orders.pop(rank, None)) is not None and not order.answer.done():
            order.answer.set_result(None)

    async def wait(self, rank: int, order: Order) -> None:
        """Until an order has been carried out, or the worker is gone.

        Raises:
            ConfigError: it cannot be, or the worker does not get on with it.
        """
        try:
            async with asyncio.timeout(STANDSTILL_S) as order.patience:
                answer = await order.answer
        except TimeoutError as error:
            raise ConfigError(
                f"{self._title(rank)} has not got on with loading for {STANDSTILL_S:g} s: its storage may hang; "
                "no expert has moved. End that worker (kill -9), which is replaced then, and ask again"
            ) from error
        finally:
            order.patience = None
        if answer is not None and answer.complaint:
            raise ConfigError(f"{self._title(rank)} cannot hold its experts: {answer.complaint}")

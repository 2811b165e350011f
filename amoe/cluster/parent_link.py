"""An API process's side of the link to its parent: lets its engine follow what the parent says of the workers."""

from __future__ import annotations

import asyncio
import logging

from amoe.cluster.admin_desk import RemoteDesk
from amoe.cluster.front_link import FrontLink
from amoe.cluster.front_messages import (
    Answer,
    Attach,
    Die,
    ExpertsMoved,
    Gone,
    Health,
    LifeBegun,
    LifeEnded,
    Listening,
    Lose,
    PastLives,
    Ping,
    Pong,
    Serve,
    Steered,
    ToFront,
    WorkerBack,
    WorkerLost,
    WorkerRemoved,
)
from amoe.engine.async_engine import AsyncEngine
from amoe.engine.control import AsyncControlChannel

logger = logging.getLogger(__name__)


class ParentLink:
    """See above. Call `run` once.

    Args:
        engine: without any worker; it runs.

    Attributes:
        desk: takes operators' orders to the parent.
        may_serve: set once the engine knows all that is so at the start.
    """

    def __init__(self, link: FrontLink[ToFront], engine: AsyncEngine) -> None:
        self.desk = RemoteDesk(link.send)
        self.may_serve = asyncio.Event()
        self._link = link
        self._engine = engine
        self._lives: dict[int, int] = {}  # the last one of each worker that has come
        self._channels: dict[int, AsyncControlChannel] = {}
        engine.on_gone = self._on_gone

    def say_listening(self) -> None:
        """Users can be served."""
        self._link.send(Listening())

    async def run(self) -> None:
        """Until the parent has gone, or cannot be understood; then the engine is dead."""
        try:
            async for message in self._link:
                await self._follow(message)
        except Exception:  # unseen, this process would serve for ever what it does not know of
            logger.exception("what the parent says cannot be followed")
        reason = "the server that this API process belongs to cannot be heard any more"
        self._engine.die(reason)
        self.desk.end(reason)
        self.may_serve.set()

    def _on_gone(self, rank: int, reason: str) -> None:
        self._link.send(Gone(rank, self._lives[rank], reason))

    async def _follow(self, message: ToFront) -> None:
        engine = self._engine
        if isinstance(message, Attach):
            self._lives[message.rank] = message.incarnation
            self._channels[message.rank] = channel = await AsyncControlChannel.open(self._link.take_socket())
            engine.attach(message.rank, channel)
        elif isinstance(message, Lose):
            await engine.lose(message.rank, message.reason)
            if (lost := self._channels.pop(message.rank, None)) is not None:  # else it is younger than the loss
                await lost.close()
        elif isinstance(message, Ping):
            self._link.send(Pong())
        elif isinstance(message, Health):
            engine.trouble, engine.note, engine.is_awaited = message.trouble, message.note, message.is_awaited
        elif isinstance(message, Die):
            engine.die(message.reason)
        elif isinstance(message, Steered):
            engine.steer_by(message.state)
        elif isinstance(message, Answer):
            self.desk.on_answer(message)
        elif isinstance(message, Serve):
            self.may_serve.set()
        else:
            self._count(message)

    def _count(
        self, message: PastLives | LifeEnded | LifeBegun | WorkerLost | WorkerBack | WorkerRemoved | ExpertsMoved
    ) -> None:
        metrics = self._engine.metrics
        if isinstance(message, PastLives):
            metrics.count_on(message.stats)
        elif isinstance(message, LifeEnded):
            metrics.life_ended(message.rank)
        elif isinstance(message, LifeBegun):
            metrics.life_begun(message.rank)
        elif isinstance(message, WorkerLost):
            metrics.count_loss(message.rank, message.role, message.kind)
        elif isinstance(message, WorkerBack):
            metrics.count_return(message.rank, message.role, message.seconds)
        elif isinstance(message, WorkerRemoved):
            metrics.worker_removed(message.rank)
        else:
            metrics.experts_moved(message.count)

"""The engines of several API processes, as those see them who keep the workers alive: one engine.

Each API process sends its requests to the workers by sockets of its own, and hears their outputs and signs of life.
What concerns all of them is here: the workers' other messages, steering, and who is there. On a loss each is told to
let its own sequences go on elsewhere. What they are told comes in order, so that none sees a life of a worker before it
has done with the last one; nobody waits for one that is slow, or stopped.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec
import numpy as np
import numpy.typing as npt

from amoe.clock import MonotonicClock
from amoe.cluster.admin import AdminDesk
from amoe.cluster.admin_desk import answer
from amoe.cluster.front_link import FrontLink
from amoe.cluster.front_messages import (
    Ask,
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
    ToParent,
    WorkerBack,
    WorkerLost,
    WorkerRemoved,
)
from amoe.cluster.local import LocalCluster
from amoe.engine.async_engine import LAST_WORDS_S
from amoe.engine.channels import Channels, WorkerChannel
from amoe.engine.messages import Heartbeat, Topology, ToServer
from amoe.engine.steering import Steering
from amoe.metrics.cluster import LossKind
from amoe.metrics.lives import WorkerLives
from amoe.stats import SteeringStats

logger = logging.getLogger(__name__)

PING_S = 5.0
START_SILENCE_S = 180.0  # it imports all that it needs before it listens to anybody
SILENCE_S = 60.0  # nothing that it does in its event loop takes so long


class FrontEnd:
    """One life of one API process, as its parent sees it. `hang_up` ends it.

    Args:
        number: no other one has ever had it: its requests are told apart by it.
        listening: set once users can be served.
    """

    def __init__(self, number: int, link: FrontLink[ToParent], listening: asyncio.Event) -> None:
        self.number = number
        self._link = link
        self._listening = listening
        self._has_answered = False
        self._num_unanswered = 0  # pings
        self._tasks: set[asyncio.Task[None]] = set()

    def tell(self, message: ToFront) -> None:
        """Queue a message; does not wait."""
        self._link.send(message)

    def attach(self, rank: int, incarnation: int, cluster: LocalCluster) -> None:
        """Connect it with a worker."""
        self._link.send(Attach(rank, incarnation), cluster.let_in(self.number, rank))

    async def listen(self, desk: AdminDesk | None, on_gone: Callable[[Gone], None]) -> None:
        """Until it has gone.

        Args:
            desk: where operators' orders are taken, if they are.
        """
        async for message in self._link:
            if isinstance(message, Listening):
                self._listening.set()
            elif isinstance(message, Pong):
                self._has_answered, self._num_unanswered = True, 0
            elif isinstance(message, Gone):
                on_gone(message)
            elif desk is not None:
                task = asyncio.create_task(self._answer(desk, message))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def fall_silent(self) -> None:
        """Returns once it has not answered for so long that it never will. Time is counted in pings: when this process
        is stopped, nobody asks."""
        while self._num_unanswered * PING_S < (SILENCE_S if self._has_answered else START_SILENCE_S):
            self._num_unanswered += 1
            self._link.send(Ping())
            await asyncio.sleep(PING_S)

    async def _answer(self, desk: AdminDesk, ask: Ask) -> None:
        self._link.send(await answer(desk, ask))

    def hang_up(self) -> None:
        """It is gone, or nobody is interested any more. What it has asked for goes on."""
        self._link.close()


class FrontEnds:
    """See above, and `amoe.cluster.supervised.SupervisedEngine`. Call `run`, then `close`.

    Args:
        cluster: started, with doors.

    Attributes:
        died: nothing can go on.
    """

    def __init__(self, cluster: LocalCluster) -> None:
        self.on_message: Callable[[int, ToServer], None] | None = None
        self.on_gone: Callable[[int, str], None] | None = None
        self.metrics = Counters(self._tell, self._tell_one)
        self.died = asyncio.Event()
        self._cluster = cluster
        self._health = Health("", "")
        self._fronts: dict[int, FrontEnd] = {}
        self._lives = {rank: worker.incarnation for rank, worker in cluster.workers.items()}  # that serve, by rank
        self._channels = Channels(cluster.channels, self._hear, self._on_end)
        self._steering = Steering(
            cluster.config, cluster.owners, MonotonicClock(), send=self._channels.send, tell=self._steered
        )
        self._task: asyncio.Task[None] | None = None

    def run(self) -> None:
        """Listen to the workers, and steer them."""
        self._channels.run()
        self._task = asyncio.create_task(self._steering.run(), name="amoe-steering")

    async def close(self) -> None:
        """Stop to listen. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, self._channels.close(), return_exceptions=True)

    # -- front ends --------------------------------------------------------------------------------------------------

    def add(self, front: FrontEnd) -> None:
        """One has come: it is told what is so now, and may serve."""
        self._fronts[front.number] = front
        front.tell(PastLives(self.metrics.lives.past))
        front.tell(self._health)
        front.tell(Steered(self._steering.state))
        for rank, incarnation in self._lives.items():
            front.attach(rank, incarnation, self._cluster)
        front.tell(Serve())

    def remove(self, front: FrontEnd) -> None:
        """It is gone. The workers find that out themselves."""
        self._fronts.pop(front.number, None)

    def on_front_gone(self, message: Gone) -> None:
        """A front end has lost a worker."""
        if self.on_gone is not None and self._lives.get(message.rank) == message.incarnation:
            self.on_gone(message.rank, message.reason)

    def _tell(self, message: ToFront) -> None:
        for front in self._fronts.values():
            front.tell(message)

    def _tell_one(self, message: ToFront) -> None:
        """What is counted is in files that all of them add up: one counts it. The log tells what nobody counts, because
        that one is just dying, or none is there."""
        for front in self._fronts.values():
            front.tell(message)
            return

    # -- as an engine ------------------------------------------------------------------------------------------------

    @property
    def trouble(self) -> str:
        """See `SupervisedEngine`."""
        return self._health.trouble

    @trouble.setter
    def trouble(self, value: str) -> None:
        self._be_well(msgspec.structs.replace(self._health, trouble=value))

    @property
    def note(self) -> str:
        """See `SupervisedEngine`."""
        return self._health.note

    @note.setter
    def note(self, value: str) -> None:
        self._be_well(msgspec.structs.replace(self._health, note=value))

    @property
    def is_awaited(self) -> bool:
        """See `SupervisedEngine`."""
        return self._health.is_awaited

    @is_awaited.setter
    def is_awaited(self, value: bool) -> None:
        self._be_well(msgspec.structs.replace(self._health, is_awaited=value))

    def _be_well(self, health: Health) -> None:
        if health != self._health:
            self._health = health
            self._tell(health)

    def on_topology(self, topology: Topology) -> None:
        """See `SupervisedEngine`."""
        self._steering.set_topology(topology)

    def measured_load(self) -> npt.NDArray[np.float64] | None:
        """See `SupervisedEngine`."""
        return self._steering.measured_load()

    def measured_speeds(self) -> npt.NDArray[np.float64]:
        """See `SupervisedEngine`."""
        return self._steering.measured_speeds()

    def attach(self, rank: int, channel: WorkerChannel) -> None:
        """See `SupervisedEngine`: of the worker that the cluster has at this rank."""
        self._channels.attach(rank, channel)
        self._lives[rank] = incarnation = self._cluster.workers[rank].incarnation
        for front in self._fronts.values():
            front.attach(rank, incarnation, self._cluster)

    async def lose(self, rank: int, reason: str) -> None:
        """See `SupervisedEngine`. It hears what the worker has said to this process; the others hear what it has said
        to them before they listen to its next life. Who is lost already is not lost again."""
        if self._lives.pop(rank, None) is not None:
            self._tell(Lose(rank, reason))
        await self._channels.detach(rank, LAST_WORDS_S)

    def die(self, reason: str) -> None:
        """See `SupervisedEngine`. The first reason stays."""
        if not self.died.is_set():
            logger.error("%s: nothing can be served any more", reason)
            self._tell(Die(reason))
            self.died.set()

    def _hear(self, rank: int, message: ToServer) -> None:
        if isinstance(message, Heartbeat):
            self._steering.observe(message.stats)
            self.metrics.lives.hear(message.stats)
        if self.on_message is not None:
            self.on_message(rank, message)

    def _on_end(self, rank: int, reason: str) -> None:
        if self.on_gone is not None:
            self.on_gone(rank, reason)

    def _steered(self, state: SteeringStats) -> None:
        self._tell(Steered(state))


class Counters:
    """See `ClusterCounters`: tells the front ends, whose metrics name it.

    Args:
        tell: all of them; tell_one: one of them.

    Attributes:
        lives: what workers have counted.
    """

    def __init__(self, tell: Callable[[ToFront], None], tell_one: Callable[[ToFront], None]) -> None:
        self.lives = WorkerLives()
        self._tell = tell
        self._tell_one = tell_one

    def worker_lost(self, rank: int, role: str, kind: LossKind) -> None:
        """A worker is dead."""
        self.lives.end(rank)
        self._tell(LifeEnded(rank))
        self._tell_one(WorkerLost(rank, role, kind))

    def worker_back(self, rank: int, role: str, seconds: float) -> None:
        """A worker that was lost serves again."""
        self.lives.welcome(rank)
        self._tell(LifeBegun(rank))
        self._tell_one(WorkerBack(rank, role, seconds))

    def worker_removed(self, rank: int) -> None:
        """A worker has left for good."""
        self.lives.remove(rank)
        self._tell(WorkerRemoved(rank))

    def experts_moved(self, count: int) -> None:
        """Copies of experts were loaded."""
        self._tell_one(ExpertsMoved(count))

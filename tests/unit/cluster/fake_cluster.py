"""Workers that are nothing but their handles, and an engine that writes down what it is told."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from amoe.cluster.cluster import WorkerCluster
from amoe.cluster.launcher import WorkerHandle
from amoe.cluster.process import title_of
from amoe.cluster.supervisor import Supervisor
from amoe.cluster.topology import TopologyBoard
from amoe.config import EngineConfig, FailureConfig, PlacementConfig
from amoe.engine.async_engine import AsyncEngine
from amoe.engine.messages import Loading, Ready, Stop, ToWorker

PLACEMENT = PlacementConfig(attention_workers=1, expert_workers=2, max_expert_workers=3)
READY = Ready(128, 16, 16, 100, address="here")


class FakeWorker:
    """See `WorkerHandle`. It is ready at once, unless the script of its rank has an error for it."""

    def __init__(self, fakes: Fakes, rank: int, incarnation: int, on_exit: Callable[[WorkerHandle], None]) -> None:
        self.rank, self.incarnation, self.title = rank, incarnation, title_of(fakes.config.placement, rank)
        self.exited = asyncio.Event()
        self.told: list[ToWorker] = []
        self.channel = cast(Any, SimpleNamespace(send=self._take))
        self.is_immortal = False
        self._fakes = fakes
        self._on_exit = on_exit

    def _take(self, message: ToWorker) -> None:
        self.told.append(message)
        if isinstance(message, Stop) and not self.is_immortal:
            self.die("exited with status 0")

    async def wait_ready(self, on_loading: Callable[[WorkerHandle, Loading], None]) -> Ready:
        error = self._fakes.scripts[self.rank].popleft() if self._fakes.scripts[self.rank] else None
        if error is not None:
            raise error
        if self._fakes.hold is not None:
            await self._fakes.hold.wait()
        return READY

    def seems_to_run(self) -> bool:
        return False

    def request_stop(self) -> None:
        self.channel.send(Stop())

    def kill(self) -> None:
        if not self.exited.is_set():
            self._fakes.events.append(f"kill {self.rank}.{self.incarnation}")
            if not self.is_immortal:
                self.die("was killed")

    def die(self, how: str) -> None:
        if not self.exited.is_set():
            self._how = how
            self.exited.set()
            self._on_exit(self)

    def describe(self) -> str:
        return self.title

    def describe_exit(self) -> str:
        return f"{self.title} {self._how}"

    def describe_output(self) -> str:
        return ""

    async def close(self) -> None:
        self._fakes.events.append(f"close {self.rank}.{self.incarnation}")


class FakeEngine:
    """What the supervisor uses of `AsyncEngine`."""

    def __init__(self, events: list[str]) -> None:
        self.trouble = self.note = ""
        self.is_awaited = False
        self.on_message: Any = None
        self.on_gone: Any = None
        self.death = ""
        self._events = events
        self.metrics = SimpleNamespace(
            worker_lost=lambda rank, role, kind: events.append(f"lost {rank} {kind}"),
            worker_back=lambda rank, role, seconds: events.append(f"back {rank}"),
            worker_removed=lambda rank: events.append(f"removed {rank}"),
        )

    def attach(self, rank: int, channel: object) -> None:
        self._events.append(f"attach {rank}")

    async def lose(self, rank: int, reason: str) -> None:
        self._events.append(f"lose {rank}")

    def die(self, reason: str) -> None:
        self.death = reason


class Fakes:
    """A cluster of fake workers under a real supervisor. `events` is what happened, in order.

    Attributes:
        scripts: by rank, errors with which the next starts fail; None: a start that works.
        hold: while it is not set, nobody becomes ready.
    """

    def __init__(self, failure: FailureConfig) -> None:
        self.config = EngineConfig(model="m", placement=PLACEMENT, failure=failure)
        self.events: list[str] = []
        self.scripts: dict[int, deque[Exception | None]] = defaultdict(deque)
        self.hold: asyncio.Event | None = None
        self.is_closed = False
        self.cluster = WorkerCluster(self.config, self, has_model=False)
        self.engine = FakeEngine(self.events)
        self.board = TopologyBoard(PLACEMENT.num_ranks, np.zeros((1, 2, 1), np.int16), self._send)
        self.supervisor = Supervisor(self.cluster, cast(AsyncEngine, self.engine), self.board)

    def _send(self, rank: int, message: ToWorker) -> None:
        self.cluster.workers[rank].channel.send(message)

    async def __aenter__(self) -> Fakes:
        ready = await self.cluster.start()
        self.board.join({rank: (0, item.address) for rank, item in enumerate(ready)})
        self.supervisor.run()
        self.events.clear()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.supervisor.stop()
        for worker in self.cluster.workers.values():
            cast(FakeWorker, worker).is_immortal = False
        await self.cluster.stop(0)
        assert self.is_closed
        assert self.engine.death == ""
        assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("amoe")]

    async def until(self, event: str) -> None:
        """Wait until something has happened."""
        await self.until_holds(lambda: event in self.events, event)

    async def until_holds(self, condition: Callable[[], bool], what: str = "it") -> None:
        """Wait until a condition holds."""
        for _ in range(3000):
            if condition():
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"never: {what}; but {self.events}")

    def worker(self, rank: int) -> FakeWorker:
        return cast(FakeWorker, self.cluster.workers[rank])

    # -- as a launcher -----------------------------------------------------------------------------------------------

    async def prepare(self, shape: object) -> None:
        pass

    async def launch(
        self, rank: int, incarnation: int, on_exit: Callable[[WorkerHandle], None], *, is_late: bool
    ) -> WorkerHandle:
        self.events.append(f"launch {rank}.{incarnation}")
        return FakeWorker(self, rank, incarnation, on_exit)

    async def close(self) -> None:
        self.is_closed = True

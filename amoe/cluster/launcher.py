"""What a cluster asks of whatever starts its workers: processes of this host, or actors of a Ray cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from amoe.engine.control import AsyncControlChannel
from amoe.engine.emulated_device import Shape
from amoe.engine.messages import Loading, Ready


class WorkerHandle(Protocol):
    """One life of one worker, as the cluster sees it.

    Attributes:
        rank, incarnation: who it is; one that is started anew has the next incarnation.
        title: as `ps` and messages name it: `expert 1`.
        channel: the server's end of its control channel.
        exited: set once it has ended, for whatever reason.
    """

    rank: int
    incarnation: int
    title: str
    channel: AsyncControlChannel
    exited: asyncio.Event

    async def wait_ready(self, on_loading: Callable[[WorkerHandle, Loading], None]) -> Ready:
        """Listen until the worker is ready; see `amoe.cluster.channel.ready_message`, which most need.

        Raises:
            ConfigError: it cannot start; the message is for the user.
            EngineDeadError: it failed or died.
        """
        ...

    def seems_to_run(self) -> bool:
        """Whether it is known to use a processor, or to wait for one, or for a disk, right now: a worker that is silent
        for that reason gets more time than one that stands still. False where nobody knows."""
        ...

    def request_stop(self) -> None:
        """Ask it to leave."""
        ...

    def kill(self) -> None:
        """End it now, whatever it is at; where that cannot be known (its host is cut off), see to it that nothing it
        says is heard any more, and set `exited`. Nothing happens if it has ended."""
        ...

    def describe(self) -> str:
        """Who it is, for a person: `expert 0 (pid 12)`."""
        ...

    def describe_exit(self) -> str:
        """How it has ended, for a person: `expert 0 (pid 12) was killed by SIGSEGV`."""
        ...

    def describe_output(self) -> str:
        """Its last lines of output, each on a line of its own; empty if it wrote nothing, or nobody knows."""
        ...

    async def close(self) -> None:
        """Give everything back, after it has exited or was killed. Idempotent."""
        ...


class Launcher(Protocol):
    """Starts workers."""

    async def prepare(self, shape: Shape | None) -> None:
        """Called once, before the first `launch`: make what is nobody's own (shared memory, placement groups).

        Args:
            shape: of the model that is served; None: the workers have none (tests).

        Raises:
            ConfigError: there is no room; the message says what to do.
        """
        ...

    async def launch(
        self, rank: int, incarnation: int, on_exit: Callable[[WorkerHandle], None], *, is_late: bool
    ) -> WorkerHandle:
        """Start a worker; it is ready later, see `WorkerHandle.wait_ready`. Several may be started at once. Whoever is
        cancelled in here leaves no worker.

        Args:
            on_exit: called in the event loop when it has ended.
            is_late: others serve already: it waits for a `Topology` on its control channel before it loads anything,
                and holds the experts that the topology gives to it.

        Raises:
            ConfigError: there is no room for it; the message says what to do.
        """
        ...

    async def close(self) -> None:
        """Give back what is not a worker's: shared memory, sockets, placement groups. Idempotent."""
        ...

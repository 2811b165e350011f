"""What a cluster asks of whatever starts its workers: processes of this host, or actors of a Ray cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from amoe.engine.control import AsyncControlChannel
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
        """Listen until the worker is ready.

        Raises:
            ConfigError: it cannot start; the message is for the user.
            EngineDeadError: it failed or died.
        """
        ...

    def request_stop(self) -> None:
        """Ask it to leave."""
        ...

    def kill(self) -> None:
        """End it now, whatever it is at; where that cannot be known (its host is cut off), see to it that nothing it
        says is heard any more. Nothing happens if it has ended."""
        ...

    def describe_exit(self) -> str:
        """How it has ended, for a person: `expert 0 (pid 12) was killed by SIGSEGV`."""
        ...

    def describe_output(self) -> str:
        """Its last lines of output, each on a line of its own; empty if it wrote nothing, or nobody knows."""
        ...

    async def close(self) -> None:
        """Give everything back, after it has exited or was killed."""
        ...


class Launcher(Protocol):
    """Starts workers."""

    async def launch(
        self, rank: int, incarnation: int, on_exit: Callable[[WorkerHandle], None], *, is_late: bool
    ) -> WorkerHandle:
        """Start a worker; it is ready later, see `WorkerHandle.wait_ready`.

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

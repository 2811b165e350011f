"""The server's ends of the workers' control channels: who is there, and who listens to whom.

A worker that is started anew at the same rank comes with a channel of its own. Nothing that the former one has said is
heard once it has been detached: no two lives of one rank are listened to.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from amoe.engine.messages import ToServer, ToWorker
from amoe.errors import AmoeError

logger = logging.getLogger(__name__)


class WorkerChannel(Protocol):
    """The server's end of one worker's control channel."""

    def send(self, message: ToWorker) -> None:
        """Queue a message; does not wait."""
        ...

    def __aiter__(self) -> AsyncIterator[ToServer]:
        """Messages of the worker, until it has gone."""
        ...


class _Line:
    """One channel, and the task that listens to it once `Channels.run` has been called."""

    def __init__(self, channel: WorkerChannel) -> None:
        self.channel = channel
        self.has_ended = asyncio.Event()
        self.listener: asyncio.Task[None] | None = None


class Channels:
    """Channels by rank.

    Args:
        channels: of the workers that are there from the beginning, by rank.
        on_message: called with every message, and the rank that it comes from.
        on_gone: called once when a channel has ended by itself, with the rank and the reason.
    """

    def __init__(
        self,
        channels: Sequence[WorkerChannel],
        on_message: Callable[[int, ToServer], None],
        on_gone: Callable[[int, str], None],
    ) -> None:
        self._on_message = on_message
        self._on_gone = on_gone
        self._is_running = False
        self._lines = {rank: _Line(channel) for rank, channel in enumerate(channels)}

    def run(self) -> None:
        """Start to listen. Call it once, in an event loop."""
        self._is_running = True
        for rank, line in self._lines.items():
            self._begin(rank, line)

    def _begin(self, rank: int, line: _Line) -> None:
        line.listener = asyncio.create_task(self._listen(rank, line), name=f"amoe-listen-{rank}")

    def is_attached(self, rank: int) -> bool:
        """Somebody is there, or has not yet been given up."""
        return rank in self._lines

    def answers(self, rank: int) -> bool:
        """Somebody is there, as far as is known."""
        return rank in self._lines and not self._lines[rank].has_ended.is_set()

    def attach(self, rank: int, channel: WorkerChannel) -> None:
        """A worker has come.

        Raises:
            ValueError: the former one of this rank has not been detached.
        """
        if rank in self._lines:
            raise ValueError(f"worker {rank} is attached already")
        self._lines[rank] = line = _Line(channel)
        if self._is_running:
            self._begin(rank, line)

    async def detach(self, rank: int, patience_s: float) -> bool:
        """Hear what a worker has said up to the end of its channel, for `patience_s` at most, and nothing after that.

        Returns:
            False: nobody is there, or somebody else has detached it meanwhile.
        """
        line = self._lines.get(rank)
        if line is None:
            return False
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(line.has_ended.wait(), patience_s)
        if self._lines.get(rank) is not line:
            return False
        if line.listener is not None:
            line.listener.cancel()  # it hears nothing more from here on, even before it has ended
        del self._lines[rank]
        return True

    async def close(self) -> None:
        """Listen to nobody any more."""
        self._is_running = False
        await asyncio.gather(*(_cancel(line) for line in self._lines.values()))

    def send(self, rank: int, message: ToWorker) -> None:
        """Send to whoever is there. A broken pipe is the listener's to report: it knows whether the worker has said
        why."""
        line = self._lines.get(rank)
        if line is not None:
            with contextlib.suppress(OSError):
                line.channel.send(message)

    async def _listen(self, rank: int, line: _Line) -> None:
        try:
            async for message in line.channel:
                self._on_message(rank, message)
            reason = f"worker {rank} has gone"
        except (OSError, AmoeError) as error:
            reason = f"lost worker {rank}: {error}"
        except Exception:
            logger.exception("a message of worker %d could not be handled", rank)
            reason = f"a message of worker {rank} could not be handled"
        line.has_ended.set()
        self._on_gone(rank, reason)


async def _cancel(line: _Line) -> None:
    if line.listener is not None:
        line.listener.cancel()
        await asyncio.gather(line.listener, return_exceptions=True)

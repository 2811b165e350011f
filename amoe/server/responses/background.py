"""Responses that are made while nobody waits for them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable

from amoe.server.conversation import close_all
from amoe.server.encoding import named_event
from amoe.server.responses.run import ResponseRun


class BackgroundRun:
    """Works on a response, whoever comes and goes. To be made within the event loop.

    Args:
        tasks: the task is in there until it ends.
        keeps_events: the client may stream the response, from any event on.
        on_end: called when the response has ended, in whatever way.
    """

    def __init__(
        self, run: ResponseRun, tasks: set[asyncio.Task[None]], *, keeps_events: bool, on_end: Callable[[], None]
    ) -> None:
        self.keeps_events = keeps_events
        self._run: ResponseRun | None = run
        self._assembler = run.assembler
        self._on_end = on_end
        self._frames: list[bytes] = []  # the event of sequence number i is the i-th
        self.num_bytes = 0  # of them
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._work(run))
        tasks.add(self._task)
        self._task.add_done_callback(tasks.discard)

    async def _work(self, run: ResponseRun) -> None:
        try:
            async with contextlib.aclosing(run.events()) as events:
                async for event in events:
                    if self.keeps_events:
                        self._frames.append(named_event(event["type"], event))
                        self.num_bytes += len(self._frames[-1])
                        self._wake()
        finally:
            self._end()

    def _end(self) -> None:
        if not self._assembler.is_over:
            self._assembler.cancel()
        self._run = None  # the store may keep us for long, but need not keep prompt and tokens
        self._on_end()
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def cancel(self) -> None:
        """Stop the work, and free what it holds. Nothing happens if it has ended."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self._run is not None:  # a task that had not begun has freed nothing
            close_all(self._run.job.generations)
        self._end()

    async def follow(self, starting_after: int = -1) -> AsyncGenerator[bytes]:
        """The events after number `starting_after`, up to the last, as they come."""
        position = max(0, starting_after + 1)
        while True:
            while position < len(self._frames):
                yield self._frames[position]
                position += 1
            if self._assembler.is_over:
                return
            await self._changed.wait()

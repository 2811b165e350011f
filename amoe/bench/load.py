"""Puts load on something that answers requests: at given times (open loop) or with a fixed number under way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from amoe.bench.record import INTERRUPTED, RequestRecord
from amoe.bench.workload import RequestSpec
from amoe.clock import Clock


class Progress(Protocol):
    """Is told what happens while it happens."""

    def advance(self, record: RequestRecord) -> None:
        """One request has ended."""
        ...


class Send(Protocol):
    """Sends one request and fills in the record as the answer comes. Failures go into the record, none is raised."""

    def __call__(self, spec: RequestSpec, record: RequestRecord) -> Awaitable[None]: ...


@dataclass(slots=True)
class LoadResult:
    """What was observed, in the order of sending; `interrupted` if the user stopped it."""

    records: list[RequestRecord]
    interrupted: bool = False


class LoadGenerator:
    """Sends requests through `send`.

    Cancelling it (Ctrl-C) is no error: requests under way become `INTERRUPTED`, and what was observed is returned.
    """

    def __init__(self, send: Send, clock: Clock, progress: Progress | None = None) -> None:
        self._send = send
        self._clock = clock
        self._progress = progress
        self._records: list[RequestRecord] = []

    async def at_times(self, specs: Sequence[RequestSpec], arrivals: Sequence[float]) -> LoadResult:
        """Send request i `arrivals[i]` (ascending) seconds from now, whatever has become of the others."""
        start = self._clock.now()

        async def run() -> None:
            async with asyncio.TaskGroup() as group:
                for spec, arrival in zip(specs, arrivals, strict=True):
                    # An absolute deadline: an error of one sleep is not carried to the next.
                    await asyncio.sleep(max(0.0, start + arrival - self._clock.now()))
                    group.create_task(self._one(spec))

        return await self._until_done_or_interrupted(run)

    async def with_concurrency(self, specs: Sequence[RequestSpec], concurrency: int) -> LoadResult:
        """Keep `concurrency` requests under way until all are answered."""
        queue = iter(specs)

        async def one_after_another(queue: Iterator[RequestSpec]) -> None:
            for spec in queue:
                await self._one(spec)

        async def run() -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(concurrency, len(specs))):
                    group.create_task(one_after_another(queue))

        return await self._until_done_or_interrupted(run)

    async def _until_done_or_interrupted(self, run: Callable[[], Awaitable[None]]) -> LoadResult:
        try:
            await run()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None:
                task.uncancel()
            return LoadResult(self._records, interrupted=True)
        return LoadResult(self._records)

    async def _one(self, spec: RequestSpec) -> None:
        record = RequestRecord(self._clock.now(), requested_tokens=spec.max_tokens)
        self._records.append(record)
        try:
            await self._send(spec, record)
        except asyncio.CancelledError:
            record.failure = INTERRUPTED
            raise
        finally:
            record.finished_at = self._clock.now()
            if self._progress is not None:
                self._progress.advance(record)

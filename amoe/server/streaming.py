"""Responses that take a while: server-sent events, many sequences in one stream, and clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from amoe.engine.async_generation import Generation
from amoe.engine.generation import GenerationDelta
from amoe.server.encoding import DONE, event
from amoe.server.errors import describe
from amoe.server.middleware.request_scope import DIRECT_SEND
from amoe.types import CapacityUsage


class NoResponse(Response):
    """For a client that has gone: nothing is sent."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pass


async def _disconnected(receive: Receive) -> None:
    """Returns when the client has gone. To be called after the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The response that `work` makes; `work` is cancelled as soon as the client has gone."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return NoResponse()
    finally:
        await _cancel(task, watcher)


class EventStream(Response):
    """Sends events until they end or the client has gone; either way the generations are closed at once.

    starlette's own StreamingResponse notices a client that has gone only when it sends, on servers of newer ASGI
    versions; a request that waits in the queue sends nothing.

    Args:
        end: the last bytes, whatever happened before.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], generations: Sequence[Generation], *, end: bytes = DONE) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._generations = generations
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump = asyncio.create_task(self._pump(send, scope.get(DIRECT_SEND, send)))
        watcher = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait((pump, watcher), return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                pump.result()
        finally:
            for generation in self._generations:
                generation.close()
            await _cancel(pump, watcher)

    async def _pump(self, send: Send, direct: Send) -> None:
        """Events go by `direct`: the layers around the route want to see the start only, and cost time at each."""
        with contextlib.suppress(OSError):  # the client has gone
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with contextlib.aclosing(self._guarded_events()) as events:
                async for chunk in events:
                    await direct({"type": "http.response.body", "body": chunk, "more_body": True})
            await direct({"type": "http.response.body", "body": b"", "more_body": False})

    async def _guarded_events(self) -> AsyncGenerator[bytes]:
        """The events; an error among them becomes one more event, since the status has been sent."""
        try:
            async with contextlib.aclosing(self._events) as events:
                async for chunk in events:
                    yield chunk
        except Exception as error:
            yield event(describe(error)[1])
        if self._end:
            yield self._end


async def interleave(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, GenerationDelta]]:
    """Deltas of all generations as they come, each with the index of its generation."""
    if len(generations) == 1:
        async for delta in generations[0]:
            yield 0, delta
        return
    # Bounded: while the consumer is busy, each generation merges its deltas.
    queue: asyncio.Queue[tuple[int, GenerationDelta | Exception | None]] = asyncio.Queue(maxsize=1)

    async def forward(index: int, generation: Generation) -> None:
        try:
            async for delta in generation:
                await queue.put((index, delta))
            await queue.put((index, None))
        except Exception as error:
            await queue.put((index, error))

    tasks = [asyncio.create_task(forward(index, generation)) for index, generation in enumerate(generations)]
    try:
        num_open = len(tasks)
        while num_open:
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield index, item
    finally:
        await _cancel(*tasks)


async def collect(generations: Sequence[Generation]) -> list[GenerationDelta]:
    """All of each generation as one delta. Frees all of them if one fails, or the caller is cancelled."""
    try:
        return [await _collect_one(generation) for generation in generations]
    finally:
        for generation in generations:
            generation.close()


async def _collect_one(generation: Generation) -> GenerationDelta:
    total = await anext(generation)
    async for delta in generation:
        total.merge(delta)
    return total


class UsageCounter:
    """Token counts of one request, which may hold several prompts with `n` choices each."""

    def __init__(self, num_sequences: int, n: int) -> None:
        self._last: list[GenerationDelta | None] = [None] * num_sequences
        self._n = n

    def update(self, index: int, delta: GenerationDelta) -> None:
        """Take the counts of sequence number `index`."""
        self._last[index] = delta

    def as_json(self) -> dict[str, Any]:
        """OpenAI's `usage`, and where capacity is on what it has done. The choices of one prompt share it, so that it
        counts once."""
        seen = [delta for delta in self._last if delta is not None]
        firsts = [delta for delta in self._last[:: self._n] if delta is not None]
        prompt = sum(delta.num_prompt_tokens for delta in firsts)
        completion = sum(delta.num_generated_tokens for delta in seen)
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(delta.num_cached_tokens for delta in firsts)},
        }
        capacities = [delta.capacity for delta in seen if delta.capacity is not None]
        return usage | ({"capacity": _capacity_json(capacities)} if capacities else {})


def _capacity_json(usages: Sequence[CapacityUsage]) -> dict[str, Any]:
    """What capacity has done to the sequences of a request; the lost gate mass is that of their mean pair."""
    pairs = sum(usage.pairs for usage in usages)
    lost = sum(usage.gate_mass_lost * usage.pairs for usage in usages)
    return {
        "pairs": pairs,
        "pairs_dropped": sum(usage.pairs_dropped for usage in usages),
        "pairs_rerouted": sum(usage.pairs_rerouted for usage in usages),
        "gate_mass_lost": lost / pairs if pairs else 0.0,
    }

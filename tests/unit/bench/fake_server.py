"""A server inside the test: answers of OpenAI's shape, piece by piece, on a clock that the test moves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import httpx

from amoe.clock import ManualClock


class Pieces(httpx.AsyncByteStream):
    """A body that comes piece by piece; `(seconds, bytes)` each, an exception instead of bytes is raised."""

    def __init__(self, clock: ManualClock, pieces: list[tuple[float, bytes | Exception]]) -> None:
        self._clock = clock
        self._pieces = pieces

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for seconds, piece in self._pieces:
            self._clock.advance(seconds)
            await asyncio.sleep(0)
            if isinstance(piece, Exception):
                raise piece
            yield piece


def event(text: str = "", *, tokens: int | None = None, finish: str | None = None, choices: bool = True) -> bytes:
    """One event; `tokens` is the usage so far, None leaves it out."""
    chunk: dict = {"choices": [{"index": 0, "text": text, "finish_reason": finish}] if choices else []}
    if tokens is not None:
        chunk["usage"] = {"prompt_tokens": 7, "completion_tokens": tokens, "total_tokens": 7 + tokens}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


class FakeServer:
    """Answers each completion by `answer(body)`; `requests` keeps the bodies."""

    def __init__(self, answer: Callable[[dict], httpx.Response], models: list[dict] | None = None) -> None:
        self.requests: list[dict] = []
        self._answer = answer
        self._models = [{"id": "fake", "max_model_len": 64}] if models is None else models

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": self._models})
        assert request.url.path == "/v1/completions"
        self.requests.append(json.loads(request.content))
        return self._answer(self.requests[-1])

    def transport(self) -> httpx.MockTransport:
        return httpx.MockTransport(self)

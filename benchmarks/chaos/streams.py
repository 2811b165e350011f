"""Streams of completions over plain sockets, every token with its time: a client that needs little of the cores."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

TIMEOUT_S = 240.0
_EVENT = b"data: {"


@dataclass
class Answer:
    """What became of one request. Times are monotonic seconds.

    Attributes:
        status: of HTTP; 0: no answer (timeout, connection lost).
        token_ids, times: of every token that was streamed, and when it came.
        usage: as the server told it at the end.
        error: what went wrong, for a person; "" if nothing did.
    """

    status: int = 0
    token_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    def complaint(self, max_tokens: int) -> str:
        """Why it is not what was asked for; "" if it is."""
        if self.error or self.status != 200:
            return self.error or f"status {self.status}"
        if self.finish_reason != "length" or len(self.token_ids) != max_tokens:
            return f"{len(self.token_ids)} of {max_tokens} tokens, finish_reason {self.finish_reason}"
        if self.usage.get("completion_tokens") != max_tokens:
            return f"usage tells of {self.usage.get('completion_tokens')} tokens, not of {max_tokens}"
        return ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """The requests of a run: the same every time.

    Attributes:
        bodies: of requests to /v1/completions; all stream, and none ends early.
        max_tokens: of each.
    """

    bodies: tuple[dict[str, Any], ...]
    max_tokens: int

    @property
    def num_tokens(self) -> int:
        """That all answers have together."""
        return len(self.bodies) * self.max_tokens


def make_load(num_greedy: int, num_sampled: int, max_tokens: int, vocab_size: int, seed: int = 0) -> Load:
    """Random prompts of 4 to 40 tokens. Every other greedy one has a repetition penalty: what it says next hangs on all
    that it has said. Sampled ones have a seed each."""
    draw = random.Random(seed)
    common = {"max_tokens": max_tokens, "ignore_eos": True, "stream": True, "return_token_ids": True}
    bodies = []
    for number in range(num_greedy + num_sampled):
        kind: dict[str, Any] = {"temperature": 0.0}
        if number >= num_greedy:
            kind = {"temperature": 1.0, "seed": number}
        elif number % 2:
            kind["repetition_penalty"] = 1.3
        prompt = [draw.randrange(3, vocab_size) for _ in range(draw.randint(4, 40))]
        bodies.append(common | kind | {"prompt": prompt})
    return Load(bodies=tuple(bodies), max_tokens=max_tokens)


class Traffic:
    """All requests of a load at once, to their ends.

    Attributes:
        answers: one for each request, as far as it has come.
        num_tokens: that have come so far.
    """

    def __init__(self, port: int, bodies: Sequence[dict[str, Any]]) -> None:
        self.answers = [Answer() for _ in bodies]
        self.num_tokens = 0
        self._port = port
        self._bodies = bodies

    async def run(self) -> list[Answer]:
        """Send all, read all."""
        asks = [self._ask(body, answer) for body, answer in zip(self._bodies, self.answers, strict=True)]
        await asyncio.gather(*asks)
        return self.answers

    async def _ask(self, body: dict[str, Any], answer: Answer) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._stream(body | {"stream_options": {"include_usage": True}}, answer)
        except TimeoutError:
            answer.error = f"no end within {TIMEOUT_S:g} s"
        except OSError as error:
            answer.error = f"connection lost: {error}"

    async def _stream(self, body: dict[str, Any], answer: Answer) -> None:
        payload = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(payload)}\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 20)
        try:
            writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + payload)
            status_line = await reader.readline()
            if not status_line:
                raise ConnectionError("it was closed without an answer")
            answer.status = int(status_line.split(b" ", 2)[1])
            while line := await reader.readline():
                if line.startswith(_EVENT):
                    self._on_event(json.loads(line[len(_EVENT) - 1 :]), answer)
                elif answer.status != 200 and line.startswith(b"{"):
                    answer.error = f"status {answer.status}: {line.decode().strip()}"
        finally:
            writer.close()

    def _on_event(self, event: dict[str, Any], answer: Answer) -> None:
        if "error" in event:
            answer.error = json.dumps(event["error"])
            return
        answer.usage = event.get("usage") or answer.usage
        for choice in event["choices"]:
            token_ids = choice.get("token_ids") or []
            answer.token_ids += token_ids
            answer.times += [time.monotonic()] * len(token_ids)
            answer.finish_reason = choice["finish_reason"] or answer.finish_reason
            self.num_tokens += len(token_ids)

"""A client that costs little: it shares its cores with the server that it measures.

Raw HTTP/1.1 over a socket per request. An answer is not parsed while it comes, its events are only counted; the number
of tokens is read from the usage at the end.
"""

from __future__ import annotations

import asyncio
import functools
import json
import re
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from amoe.errors import AmoeError
from benchmarks.peers.timing import Point

_EVENT = b"\ndata: "  # in JSON a line break is escaped: this starts an event
_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')
_TIMEOUT_S = 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedRun:
    """One run of a point over HTTP.

    Attributes:
        end_to_end: generated tokens per second from the first request sent to the last answer's end.
        ttft_p50_ms: from sending a request to the first event of its answer.
        tpot_p50_ms: from there to the answer's end, per token after the first.
        client_cpu: seconds of this process's CPU time per second.
    """

    end_to_end: float
    ttft_p50_ms: float
    tpot_p50_ms: float
    client_cpu: float


class Exchange(asyncio.Protocol):
    """Sends one request, and notes when its answer began and ended."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._body = bytearray()
        self.sent_at = self.first_at = self.last_at = 0.0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self.sent_at = time.monotonic()
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        self._body += data
        if not self.first_at and _EVENT in self._body:
            self.first_at = now
        self.last_at = now

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def num_tokens(self) -> int:
        """That the server counted.

        Raises:
            AmoeError: the answer is not a complete stream.
        """
        counts = _TOKENS.findall(self._body)
        if not self._body.startswith(b"HTTP/1.1 200") or b"[DONE]" not in self._body or not counts:
            raise AmoeError(f"the server answered {bytes(self._body[-300:])!r}")
        return int(counts[-1])


def _request(port: int, model: str, prompt: Sequence[int], output_len: int) -> bytes:
    body = json.dumps(
        {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": output_len,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


async def send_all(port: int, model: str, point: Point, prompts: Sequence[Sequence[int]]) -> ServedRun:
    """Send all prompts at once, and wait for all answers.

    Raises:
        AmoeError: an answer is an error, or shorter than asked for.
    """
    loop = asyncio.get_running_loop()
    requests = [_request(port, model, prompt, point.output_len) for prompt in prompts]
    used = _cpu_seconds()
    start = time.monotonic()
    answers: list[Exchange] = []
    try:
        for request in requests:
            _, answer = await loop.create_connection(functools.partial(Exchange, request), "127.0.0.1", port)
            answers.append(answer)
        await asyncio.wait_for(asyncio.gather(*(answer.done for answer in answers)), _TIMEOUT_S)
    except (OSError, TimeoutError) as error:
        raise AmoeError(f"no answer from 127.0.0.1:{port}: {error or type(error).__name__}") from error
    duration = max(answer.last_at for answer in answers) - start
    used = _cpu_seconds() - used
    counts = [answer.num_tokens() for answer in answers]
    if set(counts) != {point.output_len}:
        raise AmoeError(f"asked for {point.output_len} tokens each, got {sorted(set(counts))}")
    ttft = [answer.first_at - answer.sent_at for answer in answers]
    tpot = [(answer.last_at - answer.first_at) / max(1, point.output_len - 1) for answer in answers]
    return ServedRun(
        end_to_end=sum(counts) / duration,
        ttft_p50_ms=float(np.median(ttft)) * 1e3,
        tpot_p50_ms=float(np.median(tpot)) * 1e3,
        client_cpu=used / duration,
    )


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime

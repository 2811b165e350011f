"""A client that goes away frees its sequences: streaming or not, running or waiting, at the level of ASGI."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.unit.server.conftest import Harness


class Client:
    """One connection to the application: sends a body, receives, goes away when told to."""

    def __init__(self, harness: Harness, path: str, body: dict[str, Any], spec_version: str) -> None:
        self.gone = asyncio.Event()
        self.received: list[dict[str, Any]] = []
        self.started = asyncio.Event()
        self._body: bytes | None = json.dumps(body).encode()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": spec_version},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(self._body)).encode())],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        self.task = asyncio.create_task(harness.app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if self.gone.is_set():
            raise OSError("the client has gone")
        self.received.append(message)
        if message.get("body"):
            self.started.set()


REQUESTS = [
    ("/v1/completions", {"prompt": "abc", "max_tokens": 50}),
    ("/v1/completions", {"prompt": ["abc", "de"], "n": 2, "max_tokens": 50}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "abc"}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "abc"}], "n": 3}),
    ("/v1/responses", {"input": "abc"}),
    ("/v1/messages", {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 50}),
]


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), REQUESTS)
async def test_while_waiting_for_the_first_token(server: Harness, path, body, stream, spec_version):
    server.worker.runs.clear()
    client = Client(server, path, body | {"stream": stream}, spec_version)
    count = body.get("n", 1) * (len(body["prompt"]) if isinstance(body.get("prompt"), list) else 1)
    await server.worker.has_open(count)
    client.gone.set()
    await client.task
    assert server.engine.num_open == len(server.worker.open) == 0
    assert sorted(server.worker.aborted) == [request.request_id for request in server.worker.requests]


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
@pytest.mark.parametrize(("path", "body"), REQUESTS)
async def test_in_the_middle_of_a_stream(server: Harness, path, body, spec_version):
    server.worker.script = lambda request: [70] * request.params.max_tokens
    client = Client(server, path, body | {"stream": True}, spec_version)
    await client.started.wait()
    client.gone.set()
    await client.task
    assert server.engine.num_open == len(server.worker.open) == 0
    assert server.worker.aborted
    assert not [task for task in asyncio.all_tasks() if "interleave" in repr(task)]


async def test_cancelled_by_the_server(server: Harness):
    server.worker.runs.clear()
    for stream in (False, True):
        client = Client(server, "/v1/completions", {"prompt": "abc", "stream": stream}, "2.3")
        await server.worker.has_open(1)
        client.task.cancel()
        await asyncio.gather(client.task, return_exceptions=True)
        assert server.engine.num_open == len(server.worker.open) == 0


async def test_a_response_of_the_background_goes_on(server: Harness):
    server.worker.runs.clear()
    body = {"input": "abc", "background": True, "stream": True, "max_output_tokens": 3}
    client = Client(server, "/v1/responses", body, "2.3")
    await server.worker.has_open(1)
    client.gone.set()
    await client.task
    assert server.engine.num_open == len(server.worker.open) == 1
    server.worker.runs.set()
    await server.engine.drain()
    assert not server.worker.aborted

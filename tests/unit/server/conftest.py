"""A server over fake workers, and a client that calls it without a socket."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from amoe.engine.async_engine import AsyncEngine
from amoe.server.app import create_app
from amoe.server.context import ServerContext
from amoe.server.options import HttpOptions
from amoe.server.sampling import SamplingDefaults
from tests.fake_workers import FakeWorker, make_engine, make_tokenizer


@dataclass
class Harness:
    """The server under test."""

    app: FastAPI
    engine: AsyncEngine
    worker: FakeWorker
    http: httpx.AsyncClient

    async def complete(self, **fields: Any) -> httpx.Response:
        return await self.post("/v1/completions", fields)

    async def chat(self, **fields: Any) -> httpx.Response:
        fields.setdefault("messages", [{"role": "user", "content": "hi"}])
        return await self.post("/v1/chat/completions", fields)

    async def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        # Not httpx's own JSON: it cannot write half a surrogate pair, which a client can escape.
        return await self.http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})

    def ids(self, text: str) -> list[int]:
        return self.engine.tokenizer.encode(text)

    @property
    def params(self):
        """Parameters of the request that the worker got last."""
        return self.worker.requests[-1].params


def events(response: httpx.Response) -> list[Any]:
    """The JSON of each event; checks the framing, `[DONE]` included."""
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = response.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    assert all(frame.startswith("data: ") for frame in frames[:-1])
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]


def assert_error(response: httpx.Response, status: int, param: str | None = None) -> str:
    """The one shape of errors. Returns the message."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert list(response.json()) == ["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert error["param"] == param
    assert "Traceback" not in error["message"]
    return error["message"]


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def defaults() -> SamplingDefaults:
    return SamplingDefaults()


@pytest.fixture
async def server(tokenizer_directory: Path, defaults: SamplingDefaults) -> AsyncIterator[Harness]:
    engine, (worker,) = make_engine(tokenizer_directory)
    context = ServerContext(engine=engine, model_names=("fake", "alias"), defaults=defaults, created=1)
    app = create_app(context, HttpOptions(max_body_bytes=100_000))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        yield Harness(app, engine, worker, http)
    assert engine.num_open == 0, "a request was left behind"
    assert not worker.open, "a sequence was left at the worker"
    await engine.close()
    worker.die()

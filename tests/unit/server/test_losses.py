"""Workers that die while they serve HTTP requests: what clients see, and what /health tells."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import httpx
import pytest

from amoe.server.app import create_app
from amoe.server.context import ServerContext
from tests.fake_workers import FakeWorker, make_engine
from tests.request_options import extend
from tests.unit.server.conftest import Harness, events


class LossyHarness(Harness):
    """A server whose workers die all the time."""

    workers: list[FakeWorker]
    num_losses = 0

    async def under_losses(self, call: Awaitable[httpx.Response], rng: random.Random) -> httpx.Response:
        """The answer to a call, during which workers die and come back."""
        task = asyncio.ensure_future(call)
        while not task.done():
            for _ in range(rng.randint(2, 9)):
                await asyncio.sleep(0)
            rank = rng.randrange(len(self.workers))
            old, new = self.workers[rank], FakeWorker(rank)
            old.die()
            await self.engine.lose(rank, "it was killed")
            self.engine.attach(rank, new)
            self.workers[rank] = new
            self.num_losses += 1
        return await task


@pytest.fixture
async def lossy(tokenizer_directory: Path) -> AsyncIterator[LossyHarness]:
    engine, workers = make_engine(tokenizer_directory, num_workers=2, supervised=True, max_num_seqs=8, max_crashes=1000)
    app = create_app(ServerContext(engine=engine, model_names=("fake",), created=1))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        harness = LossyHarness(app, engine, workers[0], http)
        harness.workers = workers
        yield harness
    assert engine.num_open == 0
    assert engine._load.is_empty
    assert not any(worker.open for worker in harness.workers)
    await engine.close()
    for worker in harness.workers:
        worker.die()


REQUESTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/completions", {"prompt": "the dog 🙂", "max_tokens": 40}),
    ("/v1/completions", {"prompt": ["the", "dogs"], "max_tokens": 30, "n": 3, "logprobs": 2}),
    ("/v1/completions", {"prompt": ["the", "dogs"], "max_tokens": 30, "logprobs": 2, "echo": True}),
    ("/v1/completions", {"prompt": "lazy dog", "max_tokens": 40, "stop": "dogl", "n": 2}),
    ("/v1/completions", {"prompt": "abc", "max_tokens": 20, "prompt_logprobs": 1, "return_token_ids": True}),
    ("/v1/chat/completions", {"max_tokens": 30, "logprobs": True, "top_logprobs": 1, "n": 2}),
    ("/v1/chat/completions", {"max_tokens": 40, "prompt_logprobs": 2, "return_routed_experts": True}),
)


def told(answer: dict[str, Any]) -> Any:
    """What does not depend on when it was said."""
    return {name: value for name, value in answer.items() if name not in ("id", "created")}


def whole_of(parts: list[dict[str, Any]]) -> Any:
    """A stream put together: each choice, and the usage."""
    choices: dict[int, dict[str, Any]] = {}
    for part in parts:
        for choice in part["choices"]:
            extend(choices.setdefault(choice["index"], {}), choice)
    return choices, parts[-1].get("usage")


@pytest.mark.parametrize(("path", "body"), REQUESTS)
@pytest.mark.parametrize("stream", [False, True])
async def test_clients_notice_nothing(lossy: LossyHarness, path, body, stream):
    if path.endswith("/chat/completions"):
        body = body | {"messages": [{"role": "user", "content": "yo"}]}
    if stream:
        body = body | {"stream": True, "stream_options": {"include_usage": True}}
    undisturbed = await lossy.post(path, body)
    assert undisturbed.status_code == 200, undisturbed.text
    for seed in range(4):
        answer = await lossy.under_losses(lossy.post(path, body), random.Random(seed))
        assert answer.status_code == 200, answer.text
        if stream:
            assert whole_of(events(answer)) == whole_of(events(undisturbed))
        else:
            assert told(answer.json()) == told(undisturbed.json())
    assert lossy.num_losses >= 8


async def test_health_tells_what_is_the_matter(lossy: LossyHarness):
    engine, http = lossy.engine, lossy.http
    for path in ("/health", "/ping"):
        answer = await http.get(path)
        assert (answer.status_code, answer.content) == (200, b"")
        engine.note = "expert 1 is being started anew"
        answer = await http.get(path)
        assert answer.status_code == 200
        assert answer.json() == {"status": "degraded", "reason": "expert 1 is being started anew"}
        engine.trouble = "expert 1 has died 5 times in a row"
        answer = await http.get(path)
        assert answer.status_code == 503
        assert answer.json() == {"status": "unhealthy", "reason": "expert 1 has died 5 times in a row"}
        engine.note = engine.trouble = ""
        assert (await http.get(path)).content == b""


async def test_a_dead_engine_says_why(server: Harness):
    server.worker.die()
    await server.engine.died.wait()
    answer = await server.http.get("/health")
    assert answer.status_code == 503
    assert answer.json() == {"status": "unhealthy", "reason": "worker 0 has gone"}


async def test_while_nobody_is_there_requests_wait(lossy: LossyHarness):
    for worker in lossy.workers:
        worker.die()
        await lossy.engine.lose(worker.stats.rank, "it was killed")
    waiting = asyncio.create_task(lossy.complete(prompt="ab", max_tokens=4))
    for _ in range(50):
        await asyncio.sleep(0)
    assert not waiting.done()
    assert (await lossy.http.get("/health")).status_code == 200
    lossy.workers[1] = FakeWorker(1)
    lossy.engine.attach(1, lossy.workers[1])
    assert (await waiting).json()["choices"][0]["text"] == "abab"

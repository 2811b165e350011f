"""/v1/messages over fake workers: whole, streamed, counted, and errors in Anthropic's shape from every layer."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from amoe.server.app import create_app
from amoe.server.context import ServerContext
from amoe.server.options import HttpOptions, digest_keys
from tests.unit.server.conftest import Harness
from tests.unit.server.messages.anthropic_types import check_error, check_message, check_stream

USER = {"role": "user", "content": "yo"}


async def create(server: Harness, **fields: Any) -> httpx.Response:
    return await server.post("/v1/messages", {"messages": [USER], "max_tokens": 3} | fields)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream; checks the framing. There is no `[DONE]`."""
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    *frames, rest = response.text.split("\n\n")
    assert rest == ""
    result = []
    for frame in frames:
        name, data = frame.split("\n")
        result.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {result[-1]['type']}"
    return result


def prompt_of(server: Harness) -> str:
    return server.engine.tokenizer.decode(server.worker.requests[-1].prompt_token_ids)


async def test_whole(server: Harness):
    response = await create(server, system="be", metadata={"user_id": "me"}, model="alias", request_id="mine")
    message = check_message(response.json())
    assert prompt_of(server) == "s:be|u:yo|a:"
    assert (message.id, message.model, message.role) == ("msg_mine", "alias", "assistant")
    assert message.content[0].text == "s:b"
    assert message.stop_reason == "max_tokens"
    assert message.usage.input_tokens == len(server.ids("s:be|u:yo|a:"))
    assert message.usage.output_tokens == 3


async def test_stream_adds_up_to_the_whole(server: Harness):
    fields = {"max_tokens": 20, "stop_sequences": ["|"]}
    whole = (await create(server, **fields)).json()
    streamed = check_stream(events(await create(server, stream=True, **fields)))
    assert whole.pop("id") != streamed.pop("id")
    assert streamed == whole
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("stop_sequence", "|")
    assert whole["content"] == [{"type": "text", "text": "u:yo"}]


async def test_fields_reach_the_worker(server: Harness):
    await create(server, temperature=0.5, top_p=0.4, top_k=3, seed=7, stop_sequences=["zz"], capacity="exact")
    params = server.params
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0.5, 0.4, 3, 7)
    assert (params.max_tokens, params.stop, params.capacity) == (3, ("zz",), "exact")


async def test_an_answer_that_was_begun_is_continued(server: Harness):
    await create(server, messages=[USER, {"role": "assistant", "content": "I th"}])
    assert prompt_of(server) == "u:yo|a:I th"


async def test_count_tokens(server: Harness):
    body = {"messages": [USER], "system": "be"}
    response = await server.post("/v1/messages/count_tokens", body)
    assert response.json() == {"input_tokens": len(server.ids("s:be|u:yo|a:"))}
    assert not server.worker.requests
    assert (await create(server, **body)).json()["usage"]["input_tokens"] == response.json()["input_tokens"]
    for wrong, status in (({"messages": []}, 400), (body | {"model": "x"}, 404)):
        assert (await server.post("/v1/messages/count_tokens", wrong)).status_code == status


@pytest.mark.parametrize(
    ("fields", "status", "kind", "word"),
    [
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({"max_tokens": 1000}, 400, "invalid_request_error", "max_tokens is 1000"),
        ({"messages": [{"role": "user", "content": "x" * 70}]}, 400, "invalid_request_error", "messages has"),
        (
            {"messages": [USER, {"role": "user", "content": [{"type": "image"}]}]},
            400,
            "invalid_request_error",
            "1.content.0",
        ),
        ({"model": "nope"}, 404, "not_found_error", "nope"),
        ({"metadata": {"user_id": "x" * 200_000}}, 413, "request_too_large", "larger"),
    ],
)
async def test_errors(server: Harness, fields, status, kind, word):
    for stream in (False, True):
        response = await create(server, stream=stream, **fields)
        assert response.status_code == status
        assert word in check_error(response.json(), kind)
        assert int(response.headers["content-length"]) == len(response.content)


async def test_errors_of_outer_layers(server: Harness):
    response = await server.http.get("/v1/messages")
    assert response.status_code == 405
    check_error(response.json(), "invalid_request_error")
    response = await server.http.get("/v1/messages/batches")
    assert response.status_code == 404
    check_error(response.json(), "not_found_error")
    response = await server.http.post("/v1/messages", content="{")
    assert response.status_code == 400
    check_error(response.json(), "invalid_request_error")
    assert "error" in (await server.http.get("/v1/nothing")).json()  # elsewhere, in OpenAI's shape
    assert "type" not in (await server.http.get("/v1/nothing")).json()


async def test_keys(server: Harness):
    context = ServerContext(engine=server.engine, model_names=("fake",))
    app = create_app(context, HttpOptions(key_digests=digest_keys(("secret",), "test")))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        body = {"messages": [USER], "max_tokens": 3}
        for headers in ({}, {"x-api-key": "wrong"}):
            response = await http.post("/v1/messages", json=body, headers=headers)
            assert response.status_code == 401
            check_error(response.json(), "authentication_error")
        assert (await http.post("/v1/messages", json=body, headers={"x-api-key": "secret"})).status_code == 200


async def test_full_queue(server: Harness):
    server.worker.runs.clear()
    waiting = [asyncio.create_task(create(server)) for _ in range(6)]
    await server.worker.has_open(6)
    response = await create(server)
    assert response.status_code == 503
    check_error(response.json(), "overloaded_error")
    assert int(response.headers["retry-after"]) >= 1
    server.worker.runs.set()
    assert [response.status_code for response in await asyncio.gather(*waiting)] == [200] * 6


async def test_failure_in_the_middle_of_a_stream(server: Harness):
    server.worker.runs.clear()
    request = asyncio.create_task(create(server, stream=True))
    await server.worker.has_open(1)
    server.engine.die("worker 0 has gone")
    server.worker.open.clear()
    *_, last = events(await request)
    assert "worker 0" in check_error(last, "overloaded_error")


async def test_failure_of_a_whole_answer_is_a_status(server: Harness):
    server.worker.runs.clear()
    request = asyncio.create_task(create(server))
    await server.worker.has_open(1)
    server.engine.die("worker 0 has gone")
    server.worker.open.clear()
    response = await request
    assert response.status_code == 503
    assert "worker 0" in check_error(response.json(), "overloaded_error")

"""/v1/responses over fake workers: whole, streamed, in the background, and what is kept."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from tests.unit.server.conftest import Harness, assert_error
from tests.unit.server.responses.openai_types import check_response, check_stream


async def create(server: Harness, **fields: Any) -> httpx.Response:
    return await server.post("/v1/responses", {"input": "yo", "max_output_tokens": 3} | fields)


async def created(server: Harness, **fields: Any) -> dict[str, Any]:
    response = await create(server, **fields)
    assert response.status_code == 200, response.text
    check_response(response.json())
    return response.json()


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream; checks the framing."""
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = response.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    result = []
    for frame in frames[:-2]:
        name, data = frame.split("\n")
        result.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {result[-1]['type']}"
    return result


def prompt_of(server: Harness) -> str:
    return server.engine.tokenizer.decode(server.worker.requests[-1].prompt_token_ids)


async def ended(server: Harness, response_id: str) -> dict[str, Any]:
    """A response of the background, once it has ended."""
    while True:
        body = (await server.http.get(f"/v1/responses/{response_id}")).json()
        check_response(body)
        if body["status"] not in ("queued", "in_progress"):
            return body
        await asyncio.sleep(0)


async def test_whole(server: Harness):
    body = await created(server, metadata={"a": "b"}, user="me", instructions="be good", max_output_tokens=4)
    assert prompt_of(server) == "s:be good|u:yo|a:"
    assert body["status"] == "incomplete"
    assert body["output"][0]["content"][0]["text"] == "s:be"
    assert (body["metadata"], body["user"], body["instructions"]) == ({"a": "b"}, "me", "be good")
    assert body["usage"]["output_tokens"] == 4
    assert body["usage"]["total_tokens"] == 4 + body["usage"]["input_tokens"]


async def test_end_of_text(server: Harness):
    server.worker.script = lambda request: [*server.ids("hey"), 0]
    body = await created(server, max_output_tokens=30)
    assert body["status"] == "completed"
    assert body["output"][0]["content"][0]["text"] == "hey"


async def test_stream_adds_up_to_the_whole(server: Harness):
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "max_output_tokens": 9}
    whole = await created(server, **fields)
    streamed = check_stream(events(await create(server, stream=True, **fields)))
    for body in (whole, streamed):
        for key in ("id", "created_at"):
            body.pop(key)
        body["output"][0].pop("id")
    assert streamed == whole
    assert len(whole["output"][0]["content"][0]["logprobs"]) == 9


async def test_fields_reach_the_worker(server: Harness):
    await created(server, temperature=0.5, top_p=0.4, top_k=3, seed=7, stop=["zz"], capacity="exact", ignore_eos=True)
    params = server.params
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0.5, 0.4, 3, 7)
    assert (params.max_tokens, params.stop, params.capacity, params.ignore_eos) == (3, ("zz",), "exact", True)


async def test_max_output_tokens_defaults_to_what_fits(server: Harness):
    await server.post("/v1/responses", {"input": "yo"})
    assert server.params.max_tokens == 64 - len(server.worker.requests[-1].prompt_token_ids)


async def test_conversation_goes_on(server: Harness):
    server.worker.script = lambda request: [*server.ids("one"), 0]
    first = await created(server, instructions="not carried over")
    second = await created(server, input=[{"role": "user", "content": "more"}], previous_response_id=first["id"])
    assert prompt_of(server) == "u:yo|a:one|u:more|a:"
    assert second["previous_response_id"] == first["id"]
    third = await created(server, input="x", previous_response_id=second["id"])
    assert prompt_of(server) == "u:yo|a:one|u:more|a:one|u:x|a:"
    stream = check_stream(events(await create(server, input="y", previous_response_id=first["id"], stream=True)))
    assert prompt_of(server) == "u:yo|a:one|u:y|a:"
    assert (await server.http.get(f"/v1/responses/{stream['id']}")).json() == stream
    items = (await server.http.get(f"/v1/responses/{third['id']}/input_items?order=asc")).json()
    assert [item["content"][0]["text"] for item in items["data"]] == ["yo", "one", "more", "one", "x"]


async def test_item_reference(server: Harness):
    server.worker.script = lambda request: [*server.ids("one"), 0]
    answer = (await created(server))["output"][0]
    await created(server, input=[{"type": "item_reference", "id": answer["id"]}, {"role": "user", "content": "x"}])
    assert prompt_of(server) == "a:one|u:x|a:"
    response = await create(server, input=[{"type": "item_reference", "id": "msg_none"}])
    assert_error(response, 400, "input.0.id")


async def test_kept_and_deleted(server: Harness):
    body = await created(server)
    url = f"/v1/responses/{body['id']}"
    assert (await server.http.get(url)).json() == body
    assert (await server.http.delete(url)).json() == {"id": body["id"], "object": "response", "deleted": True}
    for response in (
        *(await server.http.get(url), await server.http.delete(url), await server.http.post(f"{url}/cancel")),
        await server.http.get(f"{url}/input_items"),
    ):
        assert body["id"] in assert_error(response, 404)
    assert_error(await create(server, previous_response_id=body["id"]), 404, "previous_response_id")


async def test_not_kept(server: Harness):
    body = await created(server, store=False)
    assert body["store"] is False
    assert_error(await server.http.get(f"/v1/responses/{body['id']}"), 404)
    streamed = check_stream(events(await create(server, store=False, stream=True)))
    assert_error(await server.http.get(f"/v1/responses/{streamed['id']}"), 404)


async def test_input_items_come_in_pages(server: Harness):
    texts = ["a", "b", "c"]
    body = await created(server, input=[{"role": "user", "content": text} for text in texts])
    url = f"/v1/responses/{body['id']}/input_items"
    page = (await server.http.get(url, params={"limit": 2})).json()
    assert [item["content"][0]["text"] for item in page["data"]] == ["c", "b"]
    assert page["has_more"]
    assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][1]["id"])
    rest = (await server.http.get(url, params={"after": page["last_id"]})).json()
    assert [item["content"][0]["text"] for item in rest["data"]] == ["a"]
    assert not rest["has_more"]
    assert_error(await server.http.get(url, params={"after": "x"}), 400, "after")
    assert (await server.http.get(url, params={"limit": 0})).status_code == 400


async def test_own_id(server: Harness):
    assert (await created(server, request_id="mine"))["id"] == "resp_mine"
    assert_error(await create(server, request_id="mine"), 400, "request_id")


async def test_background(server: Harness):
    server.worker.runs.clear()
    body = await created(server, background=True)
    assert body["status"] == "queued"
    assert body["background"] is True
    await server.worker.has_open(1)
    assert_error(await create(server, previous_response_id=body["id"]), 400, "previous_response_id")
    server.worker.runs.set()
    body = await ended(server, body["id"])
    assert body["status"] == "incomplete"
    assert body["output"][0]["content"][0]["text"] == "u:y"
    # Cancelling what has ended changes nothing.
    assert (await server.http.post(f"/v1/responses/{body['id']}/cancel")).json() == body


@pytest.mark.parametrize("how", ["cancel", "delete"])
async def test_background_stopped(server: Harness, how: str):
    server.worker.runs.clear()
    body = await created(server, background=True, max_output_tokens=40)
    await server.worker.has_open(1)
    url = f"/v1/responses/{body['id']}"
    if how == "delete":
        assert (await server.http.delete(url)).status_code == 200
    else:
        cancelled = (await server.http.post(f"{url}/cancel")).json()
        assert check_response(cancelled).status == "cancelled"
        assert (await server.http.get(url)).json() == cancelled
    assert server.engine.num_open == len(server.worker.open) == 0
    assert server.worker.aborted


async def test_only_the_background_can_be_cancelled(server: Harness):
    body = await created(server)
    assert "background" in assert_error(await server.http.post(f"/v1/responses/{body['id']}/cancel"), 400)


async def test_background_stream_can_be_taken_up_again(server: Harness):
    stream = events(await create(server, background=True, stream=True))
    body = check_stream(stream)
    url = f"/v1/responses/{body['id']}"
    assert events(await server.http.get(url, params={"stream": "true"})) == stream
    assert events(await server.http.get(url, params={"stream": "true", "starting_after": 4})) == stream[5:]
    assert (await server.http.get(url)).json() == body
    plain = await created(server)
    assert_error(await server.http.get(f"/v1/responses/{plain['id']}?stream=true"), 400, "stream")


async def test_background_fails(server: Harness):
    server.worker.runs.clear()
    body = await created(server, background=True)
    await server.worker.has_open(1)
    server.engine.die("worker 0 has gone")
    server.worker.open.clear()
    body = await ended(server, body["id"])
    assert body["status"] == "failed"
    assert body["error"] == {"code": "server_error", "message": "worker 0 has gone"}


async def test_failure_in_the_middle_of_a_stream(server: Harness):
    server.worker.runs.clear()
    request = asyncio.create_task(create(server, stream=True))
    await server.worker.has_open(1)
    server.engine.die("worker 0 has gone")
    server.worker.open.clear()
    stream = events(await request)
    assert check_stream(stream)["status"] == "failed"
    assert [event["type"] for event in stream[-2:]] == ["error", "response.failed"]


async def test_failure_of_a_whole_answer_is_a_status(server: Harness):
    server.worker.runs.clear()
    request = asyncio.create_task(create(server))
    await server.worker.has_open(1)
    server.engine.die("worker 0 has gone")
    server.worker.open.clear()
    assert_error(await request, 503)


async def test_full_queue(server: Harness):
    server.worker.runs.clear()
    waiting = [await created(server, background=True) for _ in range(6)]
    for fields in ({}, {"stream": True}, {"background": True}):
        response = await create(server, **fields)
        assert_error(response, 503)
        assert int(response.headers["retry-after"]) >= 1
    server.worker.runs.set()
    for body in waiting:
        await ended(server, body["id"])


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"input": "x" * 70}, 400, "input"),
        ({"input": [{"role": "user", "content": "x" * 70}], "instructions": "i"}, 400, "input"),
        ({"max_output_tokens": 1000}, 400, "max_output_tokens"),
        ({"max_output_tokens": 0}, 400, "max_output_tokens"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, 400, "input.0.content.0"),
        ({"model": "nope"}, 404, "model"),
        ({"previous_response_id": "resp_x"}, 404, "previous_response_id"),
        ({"temperature": -1}, 400, "temperature"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
    ],
)
async def test_errors(server: Harness, fields, status, param):
    for stream in (False, True):
        assert_error(await create(server, stream=stream, **fields), status, param)


async def test_an_agent_with_tools_of_its_own(server: Harness):
    """What coding agents send: tools of their own kinds, nothing stored, and answers replayed as they came."""
    server.worker.script = lambda request: [*server.ids("done"), 0]
    asked = {
        "instructions": "i",
        "tools": [{"type": "local_shell"}, {"type": "custom", "name": "patch", "format": {}}, {"type": "web_search"}],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "k",
        "client_metadata": {"a": "b"},
    }
    user = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "yo"}]}
    first = check_stream(events(await create(server, input=[user], max_output_tokens=None, **asked)))
    assert first["tools"] == []
    replayed = [{key: value for key, value in item.items() if key not in ("id", "status")} for item in first["output"]]
    check_stream(events(await create(server, input=[user, *replayed, user], max_output_tokens=None, **asked)))
    assert prompt_of(server) == "s:i|u:yo|a:done|u:yo|a:"

"""One answer, told by three APIs, whole and streamed: the same thoughts, text, calls and counts everywhere."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from pydantic_core import from_json

from amoe.server.app import create_app
from amoe.server.chat_options import ChatOptions
from amoe.server.context import ServerContext
from amoe.types import CapacityUsage
from tests.fake_workers import make_engine
from tests.unit.server.conftest import Harness
from tests.unit.server.messages import anthropic_types
from tests.unit.server.responses import openai_types

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "%s"}}</tool_call>'
ANSWERS = {
    "text": "It is grüne 🙂 weather.",
    "thoughts": "<think>Let me see.</think>It is sunny.",
    "call": "I look." + CALL % "Rome",
    "only a call": CALL % "Rome",
    "calls": "<think>Two.</think>" + CALL % "Rome" + "\n" + CALL % "Köln",
    "no call": "Say <tool_call>this is no JSON, and so on",
    "nothing": "",
}


class Answer(NamedTuple):
    """What all APIs have to agree on."""

    thoughts: str
    text: str
    calls: list[tuple[str, dict[str, Any]]]
    ending: str
    prompt_tokens: int
    generated_tokens: int
    thinking_tokens: int


@pytest.fixture
async def thinking_server(tokenizer_directory: Path) -> AsyncIterator[Harness]:
    """A server of a model that thinks and calls tools, as Qwen's do."""
    engine, (worker,) = make_engine(tokenizer_directory, max_model_len=2000)
    chat = ChatOptions(reasoning_parser="qwen3", tool_call_parser="hermes")
    app = create_app(ServerContext(engine=engine, model_names=("fake",), chat=chat))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        yield Harness(app, engine, worker, http)
    await engine.close()
    worker.die()


def arguments(text: str) -> dict[str, Any]:
    """Of a call, as far as they go."""
    return from_json(text, allow_partial=True)


def named_events(response: httpx.Response) -> list[dict[str, Any]]:
    frames = [frame for frame in response.text.split("\n\n") if frame and frame != "data: [DONE]"]
    return [json.loads(frame.split("\ndata: ")[1]) for frame in frames]


async def of_chat(server: Harness, fields: dict[str, Any]) -> Answer:
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
    choice = "required" if fields.get("forced") else "auto"
    response = await server.chat(max_tokens=fields["limit"], tools=[tool], tool_choice=choice)
    body = response.json()
    (choice,) = body["choices"]
    message, usage = choice["message"], body["usage"]
    calls = [(c["function"]["name"], arguments(c["function"]["arguments"])) for c in message.get("tool_calls") or ()]
    return Answer(
        message.get("reasoning") or "",
        message["content"] or "",
        calls,
        choice["finish_reason"],
        usage["prompt_tokens"],
        usage["completion_tokens"],
        usage.get("completion_tokens_details", {}).get("reasoning_tokens", 0),
    )


async def of_responses(server: Harness, fields: dict[str, Any]) -> Answer:
    tool = {"type": "function", "name": "get_weather", "parameters": PARAMETERS}
    asked = {"input": "hi", "max_output_tokens": fields["limit"], "tools": [tool]}
    asked["tool_choice"] = "required" if fields.get("forced") else "auto"
    response = await server.post("/v1/responses", asked | {"stream": fields.get("stream", False)})
    if fields.get("stream"):
        body = openai_types.check_stream(named_events(response))
    else:
        body = response.json()
        openai_types.check_response(body)
    items = {kind: [item for item in body["output"] if item["type"] == kind] for kind in ("reasoning", "message")}
    calls = [item for item in body["output"] if item["type"] == "function_call"]
    ending = "length" if body["status"] == "incomplete" else "tool_calls" if calls else "stop"
    return Answer(
        "".join(item["content"][0]["text"] for item in items["reasoning"]),
        "".join(item["content"][0]["text"] for item in items["message"]),
        [(item["name"], arguments(item["arguments"])) for item in calls],
        ending,
        body["usage"]["input_tokens"],
        body["usage"]["output_tokens"],
        body["usage"]["output_tokens_details"]["reasoning_tokens"],
    )


async def of_messages(server: Harness, fields: dict[str, Any]) -> Answer:
    tool = {"name": "get_weather", "input_schema": PARAMETERS}
    asked = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": fields["limit"], "tools": [tool]}
    asked["tool_choice"] = {"type": "any" if fields.get("forced") else "auto"}
    response = await server.post("/v1/messages", asked | {"stream": fields.get("stream", False)})
    if fields.get("stream"):
        body = anthropic_types.check_stream(named_events(response))
    else:
        body = response.json()
        anthropic_types.check_message(body)
    usage = body["usage"]

    def joined(kind: str) -> str:
        return "".join(block[kind] for block in body["content"] if block["type"] == kind)

    calls = [block for block in body["content"] if block["type"] == "tool_use"]
    return Answer(
        joined("thinking"),
        joined("text"),
        [(b["name"], arguments(b["json"]) if "json" in b else b["input"]) for b in calls],
        {"max_tokens": "length", "tool_use": "tool_calls", "end_turn": "stop"}[body["stop_reason"]],
        usage["input_tokens"] + usage["cache_read_input_tokens"],
        usage["output_tokens"],
        usage["output_tokens_details"]["thinking_tokens"],
    )


@pytest.mark.parametrize("name", ANSWERS)
async def test_all_tell_the_same(thinking_server: Harness, name: str):
    server = thinking_server
    server.worker.script = lambda request: [*server.ids(ANSWERS[name]), 0]
    expected = await of_chat(server, {"limit": 500})
    assert expected.generated_tokens == len(server.ids(ANSWERS[name])) + 1
    assert bool(expected.thoughts) == ("<think>" in ANSWERS[name])
    assert len(expected.calls) == ANSWERS[name].count("</tool_call>")
    assert expected.ending == ("tool_calls" if expected.calls else "stop")
    for ask in (of_responses, of_messages):
        for stream in (False, True):
            assert await ask(server, {"limit": 500, "stream": stream}) == expected, (ask.__name__, stream)


@pytest.mark.parametrize("name", ["text", "thoughts"])
async def test_all_are_cut_off_in_the_same_place(thinking_server: Harness, name: str):
    server = thinking_server
    server.worker.script = lambda request: server.ids(ANSWERS[name])
    for limit in (1, 3, 9, 14):
        expected = await of_chat(server, {"limit": limit})
        assert (expected.ending, expected.generated_tokens) == ("length", limit)
        for ask in (of_responses, of_messages):
            for stream in (False, True):
                assert await ask(server, {"limit": limit, "stream": stream}) == expected, (ask.__name__, stream)


async def test_a_forced_call_that_is_cut_off_is_no_text(thinking_server: Harness):
    server, answer = thinking_server, ANSWERS["calls"]
    server.worker.script = lambda request: server.ids(answer)
    num_calls = set()
    for limit in range(1, len(server.ids(answer)) + 1, 5):
        expected = await of_chat(server, {"limit": limit, "forced": True})
        assert (expected.text, expected.ending, expected.generated_tokens) == ("", "length", limit)
        num_calls.add(len(expected.calls))
        for ask in (of_responses, of_messages):
            for stream in (False, True):
                fields = {"limit": limit, "forced": True, "stream": stream}
                assert await ask(server, fields) == expected, (ask.__name__, stream)
    assert num_calls == {0, 1, 2}


async def test_all_three_tell_what_capacity_has_done(thinking_server: Harness):
    server = thinking_server
    server.worker.capacity = CapacityUsage(10, 3, 2, 0.25)
    expected = {"pairs": 10, "pairs_dropped": 3, "pairs_rerouted": 2, "gate_mass_lost": 0.25}
    message = {"role": "user", "content": "yo"}
    for path, body in (
        ("/v1/chat/completions", {"messages": [message], "max_tokens": 3}),
        ("/v1/responses", {"input": "yo", "max_output_tokens": 16}),
        ("/v1/messages", {"messages": [message], "max_tokens": 3}),
    ):
        assert (await server.post(path, body)).json()["usage"]["capacity"] == expected
        options = {"stream_options": {"include_usage": True}} if "completions" in path else {}
        streamed = await server.post(path, body | {"stream": True} | options)
        assert f'"capacity":{json.dumps(expected, separators=(",", ":"))}' in streamed.text

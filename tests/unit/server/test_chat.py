"""/v1/chat/completions: shapes, fields and streams."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from amoe.server.app import create_app
from amoe.server.context import ServerContext
from tests.fake_workers import make_engine, make_tokenizer
from tests.unit.server.conftest import Harness, assert_error, events


def prompt_of(server: Harness) -> str:
    return server.engine.tokenizer.decode(server.worker.requests[-1].prompt_token_ids)


async def test_response(server: Harness):
    response = await server.chat(model="fake", messages=[{"role": "user", "content": "yo"}], max_tokens=3)
    assert response.status_code == 200
    assert prompt_of(server) == "u:yo|a:"
    num_prompt = len(server.ids("u:yo|a:"))
    body = response.json()
    assert body.pop("id").startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "chat.completion",
        "model": "fake",
        "service_tier": None,
        "system_fingerprint": None,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "u:y", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": 3,
            "total_tokens": num_prompt + 3,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_messages_reach_the_template(server: Harness):
    messages = [
        {"role": "system", "content": "S"},
        {"role": "developer", "content": "D"},
        {"role": "user", "content": [{"type": "text", "text": "U1"}, {"type": "text", "text": "U2"}], "name": "me"},
        {"role": "assistant", "content": "A"},
        {"role": "assistant", "content": None},
    ]
    await server.chat(messages=messages, max_tokens=1)
    assert prompt_of(server) == "s:S|s:D|u:U1\nU2|a:A|a:|a:"
    await server.chat(messages=messages[:1], max_tokens=1, add_generation_prompt=False)
    assert prompt_of(server) == "s:S|"


async def test_template_variables(tmp_path: Path):
    template = "{{ reasoning_effort }}{{ enable_thinking }}{{ documents[0].t }}"
    engine, (worker,) = make_engine(make_tokenizer(tmp_path, chat_template=template))
    app = create_app(ServerContext(engine=engine, model_names=("fake",)))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        body = {
            "messages": [{"role": "user", "content": "x"}],
            "reasoning_effort": "low",
            "chat_template_kwargs": {"enable_thinking": "no"},
            "documents": [{"t": "doc"}],
            "max_tokens": 1,
        }
        assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
    assert engine.tokenizer.decode(worker.requests[0].prompt_token_ids) == "lownodoc"
    await engine.close()


async def test_model_without_template(tmp_path: Path):
    engine, _ = make_engine(make_tokenizer(tmp_path, chat_template=None))
    app = create_app(ServerContext(engine=engine, model_names=("fake",)))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        response = await http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
    assert "no chat template" in assert_error(response, 400, "messages")
    await engine.close()


async def test_max_tokens_defaults_to_what_fits(server: Harness):
    await server.chat()
    assert server.params.max_tokens == 64 - len(server.worker.requests[-1].prompt_token_ids)
    await server.chat(max_tokens=5)
    assert server.params.max_tokens == 5
    await server.chat(max_tokens=5, max_completion_tokens=6)
    assert server.params.max_tokens == 6


@pytest.mark.parametrize(("fields", "expected"), [({}, None), ({"logprobs": True}, 0), ({"logprobs": False}, None)])
async def test_logprobs_reach_the_worker(server: Harness, fields, expected):
    await server.chat(max_tokens=1, **fields)
    assert server.params.logprobs == expected


async def test_logprobs(server: Harness):
    server.worker.script = lambda request: server.ids("a☃")
    choice = (await server.chat(logprobs=True, top_logprobs=2)).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["a", *["\N{REPLACEMENT CHARACTER}"] * 3]
    assert [entry["bytes"] for entry in content] == [[97], [0xE2], [0x98], [0x83]]
    assert all(entry["logprob"] == -0.5 and len(entry["top_logprobs"]) == 2 for entry in content)
    assert content[0]["top_logprobs"][0] == {"token": "a", "logprob": -0.5, "bytes": [97]}


async def test_stream(server: Harness):
    chunks = events(await server.chat(messages=[{"role": "user", "content": "yo"}], max_tokens=3, stream=True))
    assert all(chunk["object"] == "chat.completion.chunk" and "usage" not in chunk for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "u:y"
    assert choices[-1]["delta"] == {}
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]


async def test_stream_usage_comes_last_and_alone(server: Harness):
    chunks = events(await server.chat(max_tokens=3, stream=True, stream_options={"include_usage": True}))
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 3


async def test_stream_of_several_choices(server: Harness):
    chunks = events(await server.chat(max_tokens=3, n=3, stream=True, logprobs=True, top_logprobs=1))
    for index in range(3):
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert choices[0]["delta"]["role"] == "assistant"
        assert choices[-1]["finish_reason"] == "length"
        assert sum(len(choice["logprobs"]["content"]) for choice in choices if choice["logprobs"]) == 3


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hi", "messages"),
        ([{"content": "x"}], "messages.0.role"),
        ([{"role": "robot", "content": "x"}], "messages.0.role"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "user", "content": 5}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages.0.content.0"),
        ([{"role": "user", "content": ["x"]}], "messages.0.content.0"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"id": "x"}]}], "messages.0.tool_calls.0.function"),
        ([{"role": "tool", "tool_call_id": "1"}], "messages.0.content"),
        ([{"role": "function", "name": "f", "content": "x"}], "messages.0.role"),
        ([{"role": "user", "content": "x" * 70}], "messages"),
        ([{"role": "user", "content": "\ud800"}], "messages"),
    ],
)
async def test_bad_messages(server: Harness, messages, param):
    assert_error(await server.chat(messages=messages), 400, param)

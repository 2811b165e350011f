"""A user's mistake gets a clear answer in one shape; what a server cannot do is refused by name."""

from __future__ import annotations

import asyncio
import json

import pytest

from amoe.server import fields
from tests.unit.server.conftest import Harness, assert_error, events

WRONG = [
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 65}, "max_tokens"),
    ({"max_tokens": "many"}, "max_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 2**70}, "top_k"),
    ({"min_p": 1.5}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"seed": 1.5}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop": "\ud800"}, "stop"),
    ({"stop": ["x"] * 33}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
    ({"stop_token_ids": [1] * 65}, "stop_token_ids"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"best_of": 3}, "best_of"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"request_id": "x" * 257}, "request_id"),
    ({"logit_bias": [5]}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"5": "1"}}, "logit_bias"),
    ({"logit_bias": {"300": 1}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"allowed_token_ids": [300]}, "allowed_token_ids"),
    ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
    ({"allowed_token_ids": [True]}, "allowed_token_ids"),
    ({"bad_words": "x"}, "bad_words"),
    ({"bad_words": [""]}, "bad_words"),
    ({"bad_words": [" "]}, "bad_words"),
    ({"bad_words": ["\ud800"]}, "bad_words"),
    ({"bad_words": ["x"] * 65}, "bad_words"),
    ({"priority": 1}, "priority"),
    ({"priority": "high"}, "priority"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"cache_salt": 5}, "cache_salt"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncation_side": "middle"}, "truncation_side"),
]


@pytest.mark.parametrize(("wrong", "param"), WRONG)
async def test_wrong_values(server: Harness, wrong, param):
    assert_error(await server.complete(prompt="a", **wrong), 400, param)
    assert_error(await server.chat(**wrong), 400, param)
    assert not server.worker.requests


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [70] * 64}, "prompt"),
        ({"prompt": "x" * 99_000}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
    ],
)
async def test_wrong_values_of_completions(server: Harness, wrong, param):
    for stream in (False, True):
        assert_error(await server.complete(**({"prompt": "a", "stream": stream} | wrong)), 400, param)
    assert not server.worker.requests


@pytest.mark.parametrize("wrong", [{"top_logprobs": 21, "logprobs": True}, {"top_logprobs": 2}])
async def test_wrong_values_of_chat(server: Harness, wrong):
    assert_error(await server.chat(**wrong), 400, "top_logprobs")


SAMPLE_VALUES = {"tool_choice": "required", "verbosity": "high", "include_reasoning": False}


@pytest.mark.parametrize("name", fields.COMPLETIONS)
async def test_unsupported_fields_of_completions(server: Harness, name):
    assert name in assert_error(await server.complete(prompt="a", **{name: 7}), 400, name)
    for neutral in (None, *fields.COMPLETIONS[name]):
        assert (await server.complete(prompt="a", max_tokens=1, **{name: neutral})).status_code == 200


@pytest.mark.parametrize("name", fields.CHAT)
async def test_unsupported_fields_of_chat(server: Harness, name):
    value = SAMPLE_VALUES.get(name, 7)
    assert name in assert_error(await server.chat(**{name: value}), 400, name)
    for neutral in (None, *fields.CHAT[name]):
        assert (await server.chat(max_tokens=1, **{name: neutral})).status_code == 200


async def test_best_of_equal_to_n(server: Harness):
    assert (await server.complete(prompt="a", n=2, best_of=2, max_tokens=1)).status_code == 200


async def test_broken_bodies(server: Harness):
    headers = {"content-type": "application/json"}
    for body in ('{"prompt": "a"', "[]", "", "5"):
        response = await server.http.post("/v1/completions", content=body, headers=headers)
        assert_error(response, 400)
    message = assert_error(await server.http.post("/v1/completions", content=b'{"a": \xff}', headers=headers), 400)
    assert "body" in message
    assert_error(await server.http.post("/v1/completions", content="prompt=a"), 400)
    response = await server.http.post("/v1/completions", content='{"prompt":"a","temperature":NaN}', headers=headers)
    assert_error(response, 400, "temperature")


async def test_body_limit(server: Harness):
    assert "100000 bytes" in assert_error(await server.complete(prompt="x" * 100_001), 413)

    async def chunks():
        for _ in range(20):
            yield b" " * 10_000

    assert_error(
        await server.http.post("/v1/completions", content=chunks(), headers={"content-type": "application/json"}), 413
    )


async def test_unknown_models_routes_and_methods(server: Harness):
    assert "'nope'" in assert_error(await server.complete(prompt="a", model="nope"), 404, "model")
    assert_error(await server.chat(model="\ud800"), 404, "model")
    assert_error(await server.http.get("/v1/models/nope"), 404, "model")
    assert_error(await server.http.get("/v2/nothing"), 404)
    assert_error(await server.http.get("/v1/completions"), 405)


async def test_full_queue(server: Harness):
    server.worker.runs.clear()
    waiting = [asyncio.create_task(server.complete(prompt="a", max_tokens=1)) for _ in range(6)]
    await server.worker.has_open(6)
    for stream in (False, True):
        response = await server.complete(prompt="a", stream=stream)
        assert "queue is full" in assert_error(response, 503)
        assert int(response.headers["retry-after"]) >= 1
    assert_error(await server.complete(prompt=["a"] * 7), 400, "prompt")
    server.worker.runs.set()
    assert [response.status_code for response in await asyncio.gather(*waiting)] == [200] * 6


async def test_dead_engine(server: Harness):
    server.worker.runs.clear()
    whole = asyncio.create_task(server.complete(prompt="a"))
    stream = asyncio.create_task(server.chat(stream=True))
    await server.worker.has_open(2)
    server.engine.die("worker 0 was killed")
    assert "worker 0 was killed" in assert_error(await whole, 503)
    (chunk,) = events(await stream)
    assert chunk["error"]["code"] == 503
    assert_error(await server.complete(prompt="a"), 503)
    assert (await server.http.get("/health")).status_code == 503
    server.worker.die()
    server.worker.open.clear()


async def test_bug_in_the_server_is_told_without_details(server: Harness, monkeypatch):
    def explode(*args):
        raise KeyError("secret")

    monkeypatch.setattr(server.engine, "start", explode)
    for response in (await server.complete(prompt="a"), await server.chat(stream=True)):
        assert "secret" not in assert_error(response, 500)


async def test_errors_of_a_stream_end_it_properly(server: Harness):
    server.worker.runs.clear()
    request = asyncio.create_task(server.complete(prompt=["a", "b"], n=2, stream=True))
    await server.worker.has_open(4)
    server.engine.die("gone")
    (chunk,) = events(await request)
    assert json.dumps(chunk["error"]["message"]) == '"gone"'
    server.worker.open.clear()

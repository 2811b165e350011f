"""Bodies that are as large as they may be, and mean nothing: one complaint, at once, and nothing made of the rest."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from amoe.server.chat_schemas import MAX_MESSAGES, MAX_TOOLS, ChatCompletionRequest
from amoe.server.completion_schemas import CompletionRequest
from amoe.server.encoding import json_bytes
from amoe.server.messages.schemas import MessagesRequest
from amoe.server.responses.schemas import ResponsesRequest
from amoe.server.tokenize import DetokenizeRequest
from tests.unit.server.conftest import Harness, assert_error

MANY = 3000
MESSAGE = {"role": "user", "content": "a"}

# Every list whose entries are checked one by one. Each complaint costs microseconds and a kilobyte: of a body of
# 16 MiB there would be eight million.
LISTS: list[tuple[type[BaseModel], dict[str, Any]]] = [
    (ChatCompletionRequest, {"messages": [1] * MANY}),
    (ChatCompletionRequest, {"messages": [{"role": "assistant", "tool_calls": [1] * 1000}]}),
    (ChatCompletionRequest, {"messages": [MESSAGE], "tools": [1] * 500}),
    (ChatCompletionRequest, {"messages": [MESSAGE], "documents": [1] * MANY}),
    (ChatCompletionRequest, {"messages": [MESSAGE], "structured_outputs": {"choice": [1] * MANY}}),
    (CompletionRequest, {"prompt": "a", "stop_token_ids": ["x"] * MANY}),
    (MessagesRequest, {"max_tokens": 1, "messages": [1] * MANY}),
    (MessagesRequest, {"max_tokens": 1, "messages": [MESSAGE], "tools": [1] * 500}),
    (MessagesRequest, {"max_tokens": 1, "messages": [MESSAGE], "stop_sequences": [1] * 30}),
    (ResponsesRequest, {"input": [1] * MANY}),
    (ResponsesRequest, {"input": "a", "tools": [1] * MANY}),
    (ResponsesRequest, {"input": "a", "include": [1] * MANY}),
    (ResponsesRequest, {"input": "a", "metadata": {str(i): 1 for i in range(MANY)}}),
    (DetokenizeRequest, {"tokens": ["x"] * MANY}),
]


@pytest.mark.parametrize(("model", "body"), LISTS)
def test_one_complaint_is_enough(model: type[BaseModel], body: dict[str, Any]):
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    assert caught.value.error_count() == 1


@pytest.mark.parametrize(
    ("model", "body", "field"),
    [
        (ChatCompletionRequest, {"messages": [MESSAGE] * (MAX_MESSAGES + 1)}, "messages"),
        (MessagesRequest, {"max_tokens": 1, "messages": [MESSAGE] * (MAX_MESSAGES + 1)}, "messages"),
        (ChatCompletionRequest, {"messages": [{"role": "assistant", "tool_calls": [{}] * 1025}]}, "messages"),
        (CompletionRequest, {"prompt": "a", "droppable_spans": [[0, 1]] * MANY}, "droppable_spans"),
        (ResponsesRequest, {"input": [MESSAGE] * (MAX_MESSAGES + 1)}, "input"),
        (ResponsesRequest, {"input": "a", "tools": [{"type": "function"}] * (MAX_TOOLS + 1)}, "tools"),
        (ResponsesRequest, {"input": "a", "metadata": {"k": "v" * 513}}, "metadata"),
    ],
)
def test_too_many_things(model: type[BaseModel], body: dict[str, Any], field: str):
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    (complaint,) = caught.value.errors()
    assert complaint["loc"][0] == field
    assert "at most" in complaint["msg"]


async def test_more_prompts_than_ever_fit_are_not_even_tokenized(server: Harness, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server.engine.tokenizer, "encode", None)
    assert "at once" in assert_error(await server.complete(prompt=["a"] * 7), 400, "prompt")
    assert "at once" in assert_error(await server.complete(prompt="a", n=7), 400, "n")


@pytest.mark.parametrize("grammar", ["a" + "\n" * 40_000, " " * 60_000, ("a" + " " * 200 + "\n") * 300])
async def test_a_grammar_of_spaces(server: Harness, grammar: str):
    """To look for GBNF in one once took minutes, in which the server did nothing else."""
    assert_error(
        await server.complete(prompt="a", structured_outputs={"grammar": grammar}), 400, "structured_outputs.grammar"
    )


@pytest.mark.parametrize(
    "grammar", ['root ::= "\\', "root ::= [\\", 'root ::= "a', "root ::= (" * 2000, "root ::= a{", "root ::= a"]
)
async def test_a_gbnf_that_breaks_off(server: Harness, grammar: str):
    assert_error(
        await server.complete(prompt="a", structured_outputs={"grammar": grammar}), 400, "structured_outputs.grammar"
    )


async def test_a_long_conversation_is_rendered_beside_the_event_loop(server: Harness):
    response = await server.chat(messages=[{"role": "user", "content": ""}] * 17, max_tokens=1)
    assert response.status_code == 200, response.text


async def test_words_of_many_tokens(server: Harness, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("amoe.server.tokenize.SHORT_TEXT_CHARS", 4)
    response = await server.post("/tokenize", {"prompt": "z" * 50, "return_token_strs": True})
    assert response.json()["token_strs"] == ["z"] * response.json()["count"]


def test_json_of_what_only_python_reads():
    """Python's JSON takes NaN and half a surrogate pair; no answer may break on them."""
    body = {"a": [float("nan"), "\ud800", float("inf"), 1.5], "b": 10**30}
    assert json.loads(json_bytes(body)) == {"a": [None, "?", None, 1.5], "b": 10**30}


async def test_numbers_that_only_python_reads_are_kept_as_null(server: Harness):
    body = '{"max_output_tokens": 1, "input": [{"role": "user", "content": "a", "x": [NaN, "\\ud800"]}]}'
    response = await server.http.post("/v1/responses", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("wrong", [-1, 2**31, 10**40])
async def test_max_completion_tokens_by_its_name(server: Harness, wrong: int):
    assert_error(await server.chat(max_completion_tokens=wrong), 400, "max_completion_tokens")


async def test_many_logprobs_are_told_beside_the_event_loop(server: Harness, monkeypatch: pytest.MonkeyPatch):
    """And say the same there."""
    prompt = {"max_tokens": 40, "logprobs": 2}
    beside = (await server.complete(prompt="a", **prompt)).json()["choices"]
    chat = {"max_tokens": 40, "logprobs": True, "top_logprobs": 2}
    chat_beside = (await server.chat(**chat)).json()["choices"]
    threads: list[str] = []
    original = asyncio.to_thread

    async def to_thread(function: Callable[..., Any], *args: Any) -> Any:
        threads.append(function.__name__)
        return await original(function, *args)

    monkeypatch.setattr(asyncio, "to_thread", to_thread)
    assert (await server.complete(prompt="a", **prompt)).json()["choices"] == beside
    assert (await server.chat(**chat)).json()["choices"] == chat_beside
    assert threads == ["part", "whole_choice"]
    for module in ("chat", "completions"):
        monkeypatch.setattr(f"amoe.server.{module}.FEW_LOGPROBS", 1000)
    assert (await server.complete(prompt="a", **prompt)).json()["choices"] == beside
    assert (await server.chat(**chat)).json()["choices"] == chat_beside
    assert threads == ["part", "whole_choice"]

"""Tools through the `openai` client, on the built-in model: it knows nothing of them, so that the grammar has to."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import openai
import pytest

from tests.served import ServedModel

ADD: dict[str, Any] = {
    "name": "add",
    "description": "Add two numbers.",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "sign": {"enum": ["+", "-"]}},
        "required": ["a", "sign"],
    },
}
NOW: dict[str, Any] = {"name": "now", "description": "The time."}
TOOLS: list[Any] = [{"type": "function", "function": function} for function in (ADD, NOW)]
QUESTION: list[Any] = [{"role": "user", "content": "What is 1 + 2?"}]


@pytest.fixture(scope="module")
def client(served: ServedModel) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def check(name: str, arguments: str) -> None:
    schema = {"add": ADD["parameters"], "now": {"maxProperties": 0}}[name]
    jsonschema.validate(json.loads(arguments), schema)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_forced_call_is_valid_streamed_and_not(client: openai.OpenAI, choice: Any, temperature: float):
    fields: dict[str, Any] = {
        "model": "amoe-builtin",
        "messages": QUESTION,
        "tools": TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "temperature": temperature,
        "seed": 7,
        "max_tokens": 100,
    }
    whole = client.chat.completions.create(**fields).choices[0]
    assert whole.finish_reason == ("tool_calls" if choice == "required" else "stop")
    assert whole.message.content is None
    (call,) = whole.message.tool_calls or []
    assert call.type == "function"
    check(call.function.name, call.function.arguments)
    with client.chat.completions.stream(**fields) as stream:
        streamed = stream.get_final_completion().choices[0]
    (again,) = streamed.message.tool_calls or []
    assert (again.function.name, again.function.arguments) == (call.function.name, call.function.arguments)
    assert streamed.finish_reason == whole.finish_reason


def test_a_loop_of_calls_and_results(client: openai.OpenAI):
    messages = list(QUESTION)
    for _ in range(2):
        answer = client.chat.completions.create(
            model="amoe-builtin", messages=messages, tools=TOOLS, tool_choice="required", max_tokens=200, temperature=0
        )
        message = answer.choices[0].message
        messages.append(message)  # with all its nulls, as programs do
        for call in message.tool_calls or []:
            assert call.type == "function"
            check(call.function.name, call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "3"})
    last = client.chat.completions.create(
        model="amoe-builtin", messages=messages, tools=TOOLS, tool_choice="none", max_tokens=8
    )
    assert last.choices[0].message.content
    assert last.choices[0].message.tool_calls is None

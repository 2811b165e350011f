"""litellm, as a provider that speaks OpenAI's protocol."""

from __future__ import annotations

import json

import litellm
import pytest

from tests.served import ServedModel

MESSAGES = [{"role": "user", "content": "def add(a, b):"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "set_speed",
        "parameters": {
            "type": "object",
            "properties": {"speed": {"type": "string", "enum": ["slow", "fast"]}},
            "required": ["speed"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def options(served: ServedModel) -> dict[str, object]:
    return {
        "model": "hosted_vllm/amoe-builtin",
        "api_base": f"{served.url}/v1",
        "api_key": "none",
        "max_tokens": 16,
        "temperature": 0,
        "num_retries": 0,
    }


def test_a_stream_says_what_the_whole_answer_says(options: dict[str, object]) -> None:
    whole = litellm.completion(messages=MESSAGES, **options)
    chunks = list(litellm.completion(messages=MESSAGES, stream=True, **options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert whole.usage.completion_tokens == 16
    assert whole.choices[0].finish_reason == "length"


async def test_async(options: dict[str, object]) -> None:
    answer = await litellm.acompletion(messages=MESSAGES, **options)
    assert answer.usage.prompt_tokens > 0


def test_a_required_tool_is_called(options: dict[str, object]) -> None:
    answer = litellm.completion(
        messages=MESSAGES,
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
        **(options | {"max_tokens": 200}),
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "set_speed"
    assert json.loads(call.function.arguments)["speed"] in ("slow", "fast")


def test_errors_have_their_class(options: dict[str, object]) -> None:
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(messages=MESSAGES, **(options | {"temperature": -1}))

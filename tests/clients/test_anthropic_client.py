"""Anthropic's client on /v1/messages of a real server: create, stream, tools, parse, count."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import pytest
from anthropic.types import Message, ToolUseBlock
from pydantic import BaseModel, Field

from tests.served import ServedModel
from tests.unit.server.messages.anthropic_types import check_message

MODEL = "amoe-builtin"
USER = {"role": "user", "content": "def add(a, b):"}
# The client's own name for temperature depends on its version: what amoe takes beside is sent as it is.
GREEDY = {"model": MODEL, "messages": [USER], "extra_body": {"temperature": 0}}
WEATHER = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


class Point(BaseModel):
    """What a structured answer is parsed into."""

    x: int = Field(ge=0, le=99)
    y: int = Field(ge=0, le=99)


@pytest.fixture
def client(served: ServedModel) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0, timeout=120) as client:
        yield client


def is_sound(message: Message) -> Message:
    check_message(message.to_dict(mode="json"))
    return message


def text_of(message: Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_create_and_stream_agree(client: anthropic.Anthropic):
    whole = is_sound(client.messages.create(max_tokens=12, **GREEDY))
    assert whole.stop_reason == "max_tokens"
    assert whole.usage.output_tokens == 12
    with client.messages.stream(max_tokens=12, **GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == text_of(is_sound(final)) == text_of(whole) != ""
    total = [message.usage.input_tokens + message.usage.cache_read_input_tokens for message in (whole, final)]
    assert total[0] == total[1]
    events = list(client.messages.create(max_tokens=12, stream=True, **GREEDY))
    assert [events[0].type, events[-2].type, events[-1].type] == ["message_start", "message_delta", "message_stop"]


def test_stop_sequence(client: anthropic.Anthropic):
    message = client.messages.create(max_tokens=60, stop_sequences=["\n"], **GREEDY)
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "\n")
    assert "\n" not in text_of(message)


def test_count_tokens(client: anthropic.Anthropic):
    asked = {"model": MODEL, "messages": [USER], "system": "You write Python.", "tools": [WEATHER]}
    count = client.messages.count_tokens(**asked).input_tokens
    usage = client.messages.create(max_tokens=1, **asked).usage
    assert count == usage.input_tokens + usage.cache_read_input_tokens


def only_call(message: Message) -> ToolUseBlock:
    assert is_sound(message).stop_reason == "tool_use"
    (call,) = (block for block in message.content if block.type == "tool_use")
    assert set(call.input) == {"city"}
    return call


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_tool_loop(client: anthropic.Anthropic, choice):
    tools = [{"type": "web_search_20250305", "name": "web_search"}, WEATHER]
    choice = choice | {"disable_parallel_tool_use": True}
    question = {"role": "user", "content": "What is the weather in Rome?"}
    asked = GREEDY | {"messages": [question], "tools": tools, "max_tokens": 100}
    first = client.messages.create(tool_choice=choice, **asked)
    call = only_call(first)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    messages = [question, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    is_sound(client.messages.create(**asked | {"messages": messages, "max_tokens": 8}))
    with client.messages.stream(tool_choice=choice, **asked) as stream:
        assert only_call(stream.get_final_message()).input == call.input


def test_parse(client: anthropic.Anthropic):
    parsed = client.messages.parse(max_tokens=60, output_format=Point, **GREEDY)
    assert isinstance(parsed.parsed_output, Point)


def test_errors(client: anthropic.Anthropic):
    with pytest.raises(anthropic.BadRequestError, match="max_tokens is 1000000"):
        client.messages.create(max_tokens=10**6, **GREEDY)
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.create(max_tokens=5, **GREEDY | {"model": "nope"})
    assert caught.value.type == "not_found_error"
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
    with pytest.raises(anthropic.BadRequestError, match=r"messages\.0\.content\.0"):
        client.messages.create(max_tokens=5, **GREEDY | {"messages": [{"role": "user", "content": [image]}]})


async def test_async(served: ServedModel):
    async with anthropic.AsyncAnthropic(base_url=served.url, api_key="none", max_retries=0, timeout=120) as client:
        whole = await client.messages.create(max_tokens=8, **GREEDY)
        async with client.messages.stream(max_tokens=8, **GREEDY) as stream:
            text = "".join([piece async for piece in stream.text_stream])
    assert text == text_of(whole)

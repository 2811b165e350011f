"""OpenAI's client on /v1/responses of a real server: create, stream, parse, tools, background, retrieve, cancel."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import openai
import pytest
from openai.types.responses import Response, ResponseFunctionToolCall
from pydantic import BaseModel, Field

from tests.served import ServedModel
from tests.unit.server.responses.openai_types import check_response

MODEL = "amoe-builtin"
GREEDY = {"model": MODEL, "temperature": 0}
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}


class Point(BaseModel):
    """What a structured answer is parsed into."""

    x: int = Field(ge=0, le=99)
    label: str = Field(max_length=6)


@pytest.fixture
def client(served: ServedModel) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def is_sound(response: Response) -> Response:
    check_response(response.to_dict(mode="json"))
    return response


def test_create_and_stream_agree(client: openai.OpenAI):
    whole = is_sound(client.responses.create(input="def add(a, b):", max_output_tokens=12, **GREEDY))
    assert whole.status == "incomplete"
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.output_text
    stream = client.responses.create(input="def add(a, b):", max_output_tokens=12, stream=True, **GREEDY)
    events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert events[-1].type == "response.incomplete"
    last = is_sound(events[-1].response)
    assert last.output_text == whole.output_text
    assert last.usage.output_tokens == whole.usage.output_tokens == 12


def test_stream_helper_and_a_field_of_ours(client: openai.OpenAI):
    extra = {"structured_outputs": {"choice": ["yes, it is"]}}
    with client.responses.stream(input="is it?", max_output_tokens=50, extra_body=extra, **GREEDY) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert final.status == "completed"
    assert is_sound(final).output_text == text == "yes, it is"


def test_parse(client: openai.OpenAI):
    parsed = client.responses.parse(input="a point", text_format=Point, max_output_tokens=100, **GREEDY)
    assert isinstance(parsed.output_parsed, Point)
    with client.responses.stream(input="a point", text_format=Point, max_output_tokens=100, **GREEDY) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_parsed == parsed.output_parsed


def only_call(response: Response) -> ResponseFunctionToolCall:
    (call,) = (item for item in response.output if item.type == "function_call")
    assert set(json.loads(call.arguments)) == {"city"}
    return call


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
def test_tool_loop(client: openai.OpenAI, choice):
    tools = [{"type": "web_search"}, WEATHER]
    question = [{"role": "user", "content": "What is the weather in Rome?"}]
    asked = {"tools": tools, "tool_choice": choice, "parallel_tool_calls": False, "max_output_tokens": 100, **GREEDY}
    first = is_sound(client.responses.create(input=question, **asked))
    call = only_call(first)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    # Once the client sends all of it again, once the server remembers.
    replayed = client.responses.create(
        input=[*question, *[item.to_dict() for item in first.output], result],
        max_output_tokens=8,
        tools=tools,
        **GREEDY,
    )
    remembered = client.responses.create(
        input=[result], previous_response_id=first.id, max_output_tokens=8, tools=tools, **GREEDY
    )
    assert is_sound(replayed).usage.input_tokens == is_sound(remembered).usage.input_tokens
    assert replayed.output_text == remembered.output_text
    with client.responses.stream(input=question, **asked) as stream:
        pieces = "".join(e.delta for e in stream if e.type == "response.function_call_arguments.delta")
        assert only_call(stream.get_final_response()).arguments == pieces == call.arguments


def test_logprobs(client: openai.OpenAI):
    response = client.responses.create(
        input="x = ", max_output_tokens=4, include=["message.output_text.logprobs"], top_logprobs=3, **GREEDY
    )
    (part,) = response.output[0].content
    assert "".join(entry.token for entry in part.logprobs) == part.text
    assert [len(entry.top_logprobs) for entry in part.logprobs] == [3] * 4


def test_retrieve_and_delete(client: openai.OpenAI):
    response = client.responses.create(input="x = 1", max_output_tokens=4, metadata={"a": "b"}, **GREEDY)
    again = client.responses.retrieve(response.id)
    assert again.to_dict() == response.to_dict()
    items = client.responses.input_items.list(response.id)
    assert [item.content[0].text for item in items] == ["x = 1"]
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def ended(client: openai.OpenAI, response: Response) -> Response:
    while response.status in ("queued", "in_progress"):
        time.sleep(0.1)
        response = client.responses.retrieve(response.id)
    return response


def test_background(client: openai.OpenAI):
    asked = {"input": "import os", "max_output_tokens": 12, **GREEDY}
    response = ended(client, client.responses.create(background=True, **asked))
    assert is_sound(response).status == "incomplete"
    assert response.output_text == client.responses.create(**asked).output_text


def test_background_cancelled(client: openai.OpenAI):
    response = client.responses.create(
        input="import os", background=True, max_output_tokens=400, extra_body={"ignore_eos": True}, **GREEDY
    )
    cancelled = is_sound(client.responses.cancel(response.id))
    assert cancelled.status == "cancelled"
    assert client.responses.retrieve(response.id).status == "cancelled"


def test_errors_name_the_field(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(input="x", max_output_tokens=10**6, **GREEDY)
    assert caught.value.param == "max_output_tokens"
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(input="x", previous_response_id="resp_none", **GREEDY)
    assert caught.value.param == "previous_response_id"


async def test_async(served: ServedModel):
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        whole = await client.responses.create(input="def add(a, b):", max_output_tokens=8, **GREEDY)
        async with client.responses.stream(input="def add(a, b):", max_output_tokens=8, **GREEDY) as stream:
            text = "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])
    assert text == whole.output_text

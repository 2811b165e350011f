"""Requests of /v1/responses as chat completions, and errors in the user's own words."""

from __future__ import annotations

import pytest
from fastapi.exceptions import RequestValidationError

from amoe.errors import RequestError
from amoe.server.errors import describe
from amoe.server.responses.schemas import ResponsesRequest
from amoe.server.responses.translate import as_stored, input_items, translate
from amoe.server.template_input import template_messages

FUNCTION = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}


def chat_of(history=(), **fields):
    fields.setdefault("input", "hi")
    body = ResponsesRequest.model_validate(fields)
    return translate(body, history, input_items(body, {}.get))[0]


def messages_of(history=(), **fields):
    return [message.model_dump(exclude_unset=True) for message in chat_of(history, **fields).messages]


def test_string():
    content = [{"type": "input_text", "text": "hi"}]
    assert messages_of() == [{"role": "user", "content": content}]
    assert messages_of(instructions="be good")[0] == {"role": "system", "content": "be good"}


def test_items_of_one_turn_are_one_message():
    items = [
        {"type": "message", "role": "user", "content": "weather?"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "I look"}]},  # no id, no status, no type
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}", "id": "fc_1", "status": "completed"},
        {"type": "function_call_output", "call_id": "c1", "output": "sun"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "rain"}]},
    ]
    _, assistant, first, second = messages_of(input=items)
    assert assistant["reasoning"] == "hm"
    assert assistant["content"] == [{"type": "output_text", "text": "I look"}]
    assert [call["function"] for call in assistant["tool_calls"]] == [
        {"name": "f", "arguments": '{"a": 1}'},
        {"name": "g", "arguments": "{}"},
    ]
    assert first == {"role": "tool", "tool_call_id": "c1", "content": "sun", "name": "f"}
    assert (second["tool_call_id"], second["name"]) == ("c2", "g")
    # And templates can take it.
    assert [m["content"] for m in template_messages(chat_of(input=items).messages)] == [
        "weather?",
        "I look",
        "sun",
        "rain",
    ]


def test_thoughts_go_with_the_call_that_follows():
    items = [
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}]},
        {"type": "function_call", "call_id": "c2", "name": "f", "arguments": "{}"},
    ]
    first, second = messages_of(input=items)
    assert "reasoning" not in first
    assert second["reasoning"] == "so"
    assert second["content"] is None


def test_thoughts_without_an_answer_are_kept():
    items = [
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}]},
        {"role": "user", "content": "and?"},
    ]
    assert [message["role"] for message in messages_of(input=items)] == ["assistant", "user"]
    assert messages_of(input=items[:1])[0]["reasoning"] == "so"


def test_encrypted_thoughts_say_nothing():
    items = [{"type": "reasoning", "summary": [], "encrypted_content": "x"}, {"role": "user", "content": "hi"}]
    assert [message["role"] for message in messages_of(input=items)] == ["user"]


def test_history_comes_between_instructions_and_input():
    roles = [m["role"] for m in messages_of([{"role": "assistant", "content": "before"}], instructions="i")]
    assert roles == ["system", "assistant", "user"]


def test_references():
    body = ResponsesRequest(input=[{"type": "item_reference", "id": "msg_1"}, {"id": "msg_1"}])
    item = {"type": "message", "role": "user", "content": "hi", "id": "msg_1"}
    assert input_items(body, {"msg_1": item}.get) == [item, item]
    with pytest.raises(RequestError) as caught:
        input_items(body, {}.get)
    assert caught.value.param == "input.0.id"


def test_tools():
    chat = chat_of(tools=[{"type": "web_search"}, FUNCTION, {"type": "local_shell"}, {"type": "custom", "name": "c"}])
    (tool,) = chat.tools
    assert tool.function.model_dump(exclude_unset=True) == {key: FUNCTION[key] for key in FUNCTION if key != "type"}
    assert chat_of(tools=[{"type": "web_search"}]).tools is None
    assert chat_of(tools=None).tools is None


@pytest.mark.parametrize(
    ("choice", "mode", "names"),
    [
        ("auto", "auto", None),
        ("none", "none", None),
        ("required", "required", None),
        ({"type": "function", "name": "f"}, "named", ("f",)),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]},
            "required",
            ("f",),
        ),
    ],
)
def test_tool_choice(choice, mode, names):
    chat = chat_of(tools=[FUNCTION], tool_choice=choice, parallel_tool_calls=False)
    assert (chat.tool_choice.mode, chat.tool_choice.names) == (mode, names)
    assert chat.parallel_tool_calls is False


def test_text_format():
    assert chat_of(text={"format": {"type": "text"}}).response_format is None
    assert chat_of(text={"format": {"type": "json_object"}}).response_format.type == "json_object"
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    sent = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    response_format = chat_of(text={"format": sent}).response_format
    assert response_format.model_dump(by_alias=True)["json_schema"]["schema"] == schema


def test_values_reach_the_chat():
    chat = chat_of(
        max_output_tokens=9,
        temperature=0.5,
        top_p=0.4,
        reasoning={"effort": "low"},
        top_k=3,
        seed=4,
        capacity="exact",
        priority=0,
        model="m",
        stop=["x"],
        presence_penalty=0.5,
    )
    assert (chat.max_completion_tokens, chat.temperature, chat.top_p, chat.top_k, chat.seed) == (9, 0.5, 0.4, 3, 4)
    assert (chat.capacity, chat.model, chat.stop, chat.reasoning_effort) == ("exact", "m", ("x",), "low")
    assert chat.presence_penalty == 0.5
    assert not chat.logprobs


@pytest.mark.parametrize("fields", [{"include": ["message.output_text.logprobs"]}, {"top_logprobs": 2}])
def test_logprobs(fields):
    chat = chat_of(**fields)
    assert chat.logprobs
    assert chat.top_logprobs == fields.get("top_logprobs", 0)


def test_null_is_the_default():
    nullable = [
        *("instructions", "store", "background", "stream", "tools", "tool_choice", "parallel_tool_calls", "include"),
        *("max_output_tokens", "temperature", "top_p", "text", "reasoning", "truncation", "metadata", "user", "prompt"),
        *(
            "conversation",
            "context_management",
            "service_tier",
            "max_tool_calls",
            "top_logprobs",
            "n",
            "stream_options",
        ),
    ]
    assert chat_of(**dict.fromkeys(nullable)) == chat_of()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"conversation": "c"}, "conversation"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"return_token_ids": True}, "return_token_ids"),
        ({"n": 2}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"top_k": "x"}, "top_k"),
        ({"reasoning": {"effort": 5}}, "reasoning.effort"),
        ({"reasoning": {"summary": "long"}}, "reasoning.summary"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({"tools": [{"type": "x"}, {"type": "function", "name": "a b"}]}, "tools.1.name"),
        ({"tools": [{"type": "function"}]}, "tools.0.name"),
        ({"tools": [{"type": "function", "name": "f", "parameters": 5}]}, "tools.0.parameters"),
        ({"tools": [{"name": "f"}]}, "tools"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "function"}, "tools": [FUNCTION]}, "tool_choice"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"background": True, "store": False}, "background"),
        ({"metadata": {"a": 5}}, "metadata.a"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"truncation": "left"}, "truncation"),
        ({"input": 5}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "robot", "content": ""}]}, "input.0.role"),
        ({"input": [{"role": "user", "content": "x"}, {"role": "user"}]}, "input.1.content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content.0"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input.0"),
        ({"input": [{}]}, "input.0"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input.0.call_id"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": 5}]}, "input.0.arguments"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": 5}]}, "input.0.output"),
        ({"input": [{"type": "reasoning", "summary": "x"}]}, "input.0.summary"),
        ({"input": [{"type": "reasoning", "summary": [{"text": 5}]}]}, "input.0.summary.0.text"),
        ({"instructions": 5}, "instructions"),
    ],
)
def test_errors_name_the_users_own_field(fields, param):

    def read() -> None:
        body = ResponsesRequest.model_validate({"input": "hi"} | fields)
        chat, names = translate(body, [], input_items(body, {}.get))
        with names.told():
            template_messages(chat.messages)

    with pytest.raises((RequestError, RequestValidationError, ValueError)) as caught:
        read()
    error = caught.value
    if not isinstance(error, RequestError | RequestValidationError):  # of pydantic: FastAPI raises its own for it
        error = RequestValidationError([{**d, "loc": ("body", *d["loc"])} for d in error.errors()])
    status, content = describe(error)
    assert status == 400
    assert content["error"]["param"] == param, content
    assert param.split(".")[-1] in content["error"]["message"]


@pytest.mark.parametrize(("role", "wanted"), [("user", "input_text"), ("assistant", "output_text")])
def test_a_part_that_is_no_text_is_told_what_text_is_called_here(role, wanted):
    image = {"type": "input_image", "image_url": "x"}
    body = ResponsesRequest.model_validate({"input": [{"role": role, "content": [image]}]})
    with pytest.raises(RequestError, match=f"part of type '{wanted}', not 'input_image'"):
        translate(body, [], input_items(body, {}.get))


def test_stored_items_have_all_that_is_told_of_them():
    items = as_stored(
        [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "ho", "id": "msg_1"},
            {"type": "function_call_output", "call_id": "c", "output": "x"},
            {"type": "reasoning"},
            {"role": "user", "content": "x", "id": {}},
        ]
    )
    assert items[0]["content"] == [{"type": "input_text", "text": "hi"}]
    assert items[1]["content"] == [{"type": "output_text", "text": "ho", "annotations": []}]
    assert items[1]["id"] == "msg_1"
    assert [item["type"] for item in items] == [*("message", "message", "function_call_output", "reasoning", "message")]
    assert all(isinstance(item["id"], str) and item["status"] == "completed" for item in items)

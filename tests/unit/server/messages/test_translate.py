"""Requests of /v1/messages as chat completions, and errors in the user's own words."""

from __future__ import annotations

import pytest
from fastapi.exceptions import RequestValidationError

from amoe.errors import RequestError
from amoe.server.errors import describe
from amoe.server.messages.schemas import MessagesPrompt, MessagesRequest
from amoe.server.messages.translate import translate
from amoe.server.template_input import template_messages

USER = {"role": "user", "content": "hi"}
TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object"}}


def chat_of(*messages, **fields):
    body = {"messages": list(messages) or [USER], "max_tokens": 5} | fields
    return translate(MessagesRequest.model_validate(body))[0]


def messages_of(*messages, **fields):
    return [message.model_dump(exclude_unset=True) for message in chat_of(*messages, **fields).messages]


def test_system():
    assert messages_of(system="be good") == [{"role": "system", "content": "be good"}, USER]
    blocks = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b"}]
    assert messages_of(system=blocks)[0]["content"] == "a\nb"
    assert messages_of({"role": "system", "content": "s"}, USER)[0] == {"role": "system", "content": "s"}


def test_a_turn_with_tools():
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "weather?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "I look"},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}},
                {"type": "tool_use", "id": "t2", "name": "g", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "sun"},
                {
                    "type": "tool_result",
                    "tool_use_id": "t2",
                    "content": [{"type": "text", "text": "no"}],
                    "is_error": True,
                },
                {"type": "text", "text": "and?"},
            ],
        },
    ]
    _, assistant, first, second, last = messages_of(*messages)
    assert (assistant["content"], assistant["reasoning"]) == ("I look", "hm")
    assert [call["function"] for call in assistant["tool_calls"]] == [
        {"name": "f", "arguments": {"a": 1}},
        {"name": "g", "arguments": {}},
    ]
    assert first == {"role": "tool", "tool_call_id": "t1", "content": "sun", "name": "f"}
    assert (second["tool_call_id"], second["content"]) == ("t2", "Error: no")
    assert last == {"role": "user", "content": "and?"}
    # And templates can take it.
    assert len(template_messages(chat_of(*messages).messages)) == 5


def test_a_call_alone_has_no_text():
    messages = [USER, {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]}]
    messages.append({"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t"}]})
    _, assistant, result = messages_of(*messages)
    assert assistant["content"] is None
    assert result["content"] == ""


def test_an_answer_that_was_begun_is_continued():
    chat = chat_of(USER, {"role": "assistant", "content": "I"})
    assert chat.continue_final_message
    assert not chat.add_generation_prompt
    assert not chat_of(USER).continue_final_message


def test_tools():
    chat = chat_of(tools=[{"type": "web_search_20250305", "name": "web_search"}, TOOL, {"type": "custom", **TOOL}])
    assert [tool.function.name for tool in chat.tools] == ["f", "f"]
    assert chat.tools[0].function.parameters == {"type": "object"}
    only_server_tools = chat_of(tools=[{"type": "bash_20250124", "name": "bash"}], tool_choice={"type": "auto"})
    assert only_server_tools.tools is None
    assert only_server_tools.tool_choice is None


@pytest.mark.parametrize(
    ("choice", "mode", "names"),
    [
        ({"type": "auto"}, "auto", None),
        ({"type": "any"}, "required", None),
        ({"type": "none"}, "none", None),
        ({"type": "tool", "name": "f"}, "named", ("f",)),
    ],
)
def test_tool_choice(choice, mode, names):
    chat = chat_of(tools=[TOOL], tool_choice=choice)
    assert (chat.tool_choice.mode, chat.tool_choice.names, chat.parallel_tool_calls) == (mode, names, True)
    chat = chat_of(tools=[TOOL], tool_choice=choice | {"disable_parallel_tool_use": True})
    assert not chat.parallel_tool_calls


def test_values_reach_the_chat():
    chat = chat_of(temperature=0.5, top_p=0.4, top_k=3, stop_sequences=["x"], seed=4, capacity="exact", model="m")
    assert (chat.max_tokens, chat.temperature, chat.top_p, chat.top_k, chat.seed) == (5, 0.5, 0.4, 3, 4)
    assert (chat.stop, chat.capacity, chat.model) == (("x",), "exact", "m")


@pytest.mark.parametrize(
    ("thinking", "variables"),
    [
        (None, None),
        ({"type": "adaptive"}, None),
        ({"type": "enabled", "budget_tokens": 4}, {"enable_thinking": True, "thinking": True}),
        ({"type": "disabled"}, {"enable_thinking": False, "thinking": False}),
    ],
)
def test_thinking(thinking, variables):
    assert chat_of(thinking=thinking).chat_template_kwargs == variables
    if variables is not None:
        own = chat_of(thinking=thinking, chat_template_kwargs={"enable_thinking": "mine"}).chat_template_kwargs
        assert own == variables | {"enable_thinking": "mine"}


def test_output_config():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    chat = chat_of(output_config={"effort": "low", "format": {"type": "json_schema", "schema": schema}})
    assert chat.reasoning_effort == "low"
    assert chat.response_format.model_dump(by_alias=True)["json_schema"]["schema"] == schema


def test_counting_takes_the_same_messages():
    chat, _ = translate(MessagesPrompt.model_validate({"messages": [USER], "system": "s", "tools": [TOOL]}))
    assert len(chat.messages) == 2
    assert chat.max_tokens is None


def image(**fields):
    return {"role": "user", "content": [{"type": "image", **fields}]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"top_k": "x"}, "top_k"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"stop_sequences": ["x" * 2000]}, "stop_sequences"),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "maybe"}}, "thinking.type"),
        ({"container": "c"}, "container"),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
        ({"stop": "x"}, "stop"),
        ({"logprobs": True}, "logprobs"),
        ({"n": 2}, "n"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [USER, image()]}, "messages.1.content.0"),
        ({"messages": [USER, image()], "system": "s"}, "messages.1.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages.0.content.0.tool_use_id"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [{}]}]}]},
            "messages.0.content.0.content.0",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f"}]}]},
            "messages.0.content.0.input",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]}
                ]
            },
            "messages",
        ),
        ({"system": [{"type": "image"}]}, "system.0"),
        ({"system": 5}, "system"),
        ({"tools": [{"type": "bash_20250124", "name": "x"}, {"name": "a b", "input_schema": {}}]}, "tools.1.name"),
        ({"tools": [{"input_schema": {}}]}, "tools.0.name"),
        ({"tools": [{"name": "f", "input_schema": 5}]}, "tools.0.input_schema"),
        ({"tool_choice": {"type": "tool"}, "tools": [TOOL]}, "tool_choice.name"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    ],
)
def test_errors_name_the_users_own_field(fields, param):
    def read() -> None:
        body = MessagesRequest.model_validate({"messages": [USER], "max_tokens": 5} | fields)
        chat, names = translate(body)
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

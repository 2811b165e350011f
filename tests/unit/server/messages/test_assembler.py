"""Deltas of a conversation as blocks and events, held against Anthropic's own types."""

from __future__ import annotations

import json

import pytest

from amoe.server.messages.assembler import MessageAssembler, tool_input
from tests.unit.server.deltas import USAGE, call, nothing, say, think
from tests.unit.server.messages.anthropic_types import check_message, check_stream


def build(deltas, stop=None, stop_sequences=()):
    """The message, after a check that its events add up to it."""
    assembler = MessageAssembler("msg_1", "fake", 5, list(stop_sequences))
    events = assembler.begin()
    for delta in deltas:
        events += assembler.push(delta)
    events += assembler.finish(deltas[-1].finish_reason, stop, USAGE, 3)
    message = assembler.message
    check_message(message)
    streamed = check_stream(events)
    for block in streamed["content"]:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block.pop("json", "{}"))
    assert streamed == message
    return message


def test_text():
    message = build([say("a"), nothing(), say("b", "stop")])
    assert message["content"] == [{"type": "text", "text": "ab"}]
    assert (message["stop_reason"], message["stop_sequence"]) == ("end_turn", None)
    assert message["usage"] == {
        "input_tokens": 3,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 2,
        "output_tokens": 7,
        "output_tokens_details": {"thinking_tokens": 3},
    }


@pytest.mark.parametrize(
    ("finish_reason", "stop", "reason"),
    [
        ("stop", None, "end_turn"),
        ("stop", 17, "end_turn"),
        ("stop", "END", "stop_sequence"),
        ("stop", "not asked for", "end_turn"),
        ("length", None, "max_tokens"),
    ],
)
def test_stop_reasons(finish_reason, stop, reason):
    message = build([say("a", finish_reason)], stop, ["END"])
    assert message["stop_reason"] == reason
    assert message["stop_sequence"] == (stop if reason == "stop_sequence" else None)


@pytest.mark.parametrize(
    ("finish_reason", "reason"), [("tool_calls", "tool_use"), ("stop", "tool_use"), ("length", "max_tokens")]
)
def test_stop_reason_of_a_call(finish_reason, reason):
    assert build([say("a"), call(0, "f", "{}", finish_reason)])["stop_reason"] == reason


def test_thoughts_text_and_calls():
    deltas = [
        *(think("hm"), think("m"), say("I "), say("look"), nothing()),
        *(call(0, "f", '{"a"'), call(0, None, ": 1}"), call(1, "g", "", "tool_calls")),
    ]
    thinking, text, first, second = build(deltas)["content"]
    assert thinking == {"type": "thinking", "thinking": "hmm", "signature": ""}
    assert text == {"type": "text", "text": "I look"}
    assert first == {"type": "tool_use", "id": "call_0", "name": "f", "input": {"a": 1}}
    assert second == {"type": "tool_use", "id": "call_1", "name": "g", "input": {}}


def test_nothing_said_is_an_empty_text():
    assert build([nothing("stop")])["content"] == [{"type": "text", "text": ""}]


@pytest.mark.parametrize(
    ("arguments", "value"),
    [("", {}), ('{"a": [1, 2]}', {"a": [1, 2]}), ('{"a": 1, "b": "x', {"a": 1}), ("[1]", {}), ("nonsense", {})],
)
def test_tool_input_goes_as_far_as_the_model_got(arguments, value):
    assert tool_input(arguments) == value

"""Anthropic's own types, as the judge of shapes."""

from __future__ import annotations

from typing import Any

from anthropic.types import ErrorResponse, Message, RawMessageStreamEvent
from pydantic import TypeAdapter

EVENT = TypeAdapter(RawMessageStreamEvent)


def check_message(body: dict[str, Any]) -> Message:
    """A whole message, or one that begins."""
    message = Message.model_validate(body)
    assert not message.model_extra
    assert [block.type for block in message.content] == [block["type"] for block in body["content"]]
    assert not any(block.model_extra for block in message.content)
    return message


def check_stream(events: list[dict[str, Any]]) -> dict[str, Any]:
    """All events of a message: shapes, order. Returns what they add up to."""
    first, ping, *middle, ending, last = events
    assert (first["type"], ping["type"], ending["type"], last["type"]) == (
        *("message_start", "ping", "message_delta", "message_stop"),
    )
    assert first["message"]["content"] == []
    for event in (first, *middle, ending, last):
        parsed = EVENT.validate_python(event)
        assert parsed.type == event["type"]
        assert not parsed.model_extra
    message = first["message"] | ending["delta"] | {"usage": ending["usage"], "content": []}
    open_index = None
    for event in middle:
        if event["type"] == "content_block_start":
            assert open_index is None
            open_index = len(message["content"])
            message["content"].append({**event["content_block"]})
        assert event["index"] == open_index
        if event["type"] == "content_block_delta":
            _add(message["content"][-1], event["delta"])
        if event["type"] == "content_block_stop":
            open_index = None
    assert open_index is None
    return message


def _add(block: dict[str, Any], delta: dict[str, Any]) -> None:
    kind = delta["type"]
    if kind == "input_json_delta":
        assert block["type"] == "tool_use"
        block["json"] = block.get("json", "") + delta["partial_json"]
    else:
        assert kind == f"{block['type']}_delta"
        block[block["type"]] += delta[block["type"]]


def check_error(body: dict[str, Any], kind: str) -> str:
    """An error, in a response or in a stream. Returns the message."""
    assert set(body) == {"type", "error"}
    assert body["type"] == "error"
    assert set(body["error"]) == {"type", "message"}
    assert body["error"]["type"] == kind
    if kind != "request_too_large":  # in Anthropic's documentation, but not in the types
        assert not ErrorResponse.model_validate(body).error.model_extra
    return body["error"]["message"]

"""OpenAI's own types, as the judge of shapes."""

from __future__ import annotations

from typing import Any

from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

EVENT = TypeAdapter(ResponseStreamEvent)

# Of the Open Responses specification, which asks for more than OpenAI's types do.
REQUIRED = {
    *("id", "object", "created_at", "completed_at", "status", "incomplete_details", "model", "previous_response_id"),
    *("instructions", "output", "error", "tools", "tool_choice", "truncation", "parallel_tool_calls", "text", "top_p"),
    *("presence_penalty", "frequency_penalty", "top_logprobs", "temperature", "reasoning", "user", "usage"),
    *("max_output_tokens", "max_tool_calls", "store", "background", "service_tier", "metadata", "safety_identifier"),
    "prompt_cache_key",
}
NOT_OPENAIS = {"store", "presence_penalty", "frequency_penalty"}


def check_response(body: dict[str, Any]) -> Response:
    """A whole response, or a snapshot of one."""
    assert set(body) >= REQUIRED
    response = Response.model_validate(body)
    assert set(response.model_extra or {}) <= NOT_OPENAIS
    for item, sent in zip(response.output, body["output"], strict=True):
        assert item.type == sent["type"]
        assert not item.model_extra
    return response


def check_event(event: dict[str, Any]) -> Any:
    """One event of a stream."""
    parsed = EVENT.validate_python(event)
    assert parsed.type == event["type"]
    assert not parsed.model_extra, parsed.model_extra
    if "response" in event:
        check_response(event["response"])
    return parsed


def check_stream(events: list[dict[str, Any]]) -> dict[str, Any]:
    """All events of a response: shapes, numbers, and that they add up to its end. Returns the response."""
    for number, event in enumerate(events):
        check_event(event)
        assert event["sequence_number"] == number
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    last = events[-1]["response"]
    assert events[-1]["type"] == f"response.{last['status']}"
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == last["output"]
    for index, item in enumerate(done):
        _check_item([event for event in events if event.get("output_index") == index], item)
    return last


def _check_item(events: list[dict[str, Any]], item: dict[str, Any]) -> None:
    added, *between, _ = events
    assert added["type"] == "response.output_item.added"
    assert added["item"]["status"] == "in_progress"
    assert all(event["item_id"] == item["id"] for event in between)
    deltas = "".join(
        event["delta"] for event in between if event["type"].endswith((".delta",)) and "summary" not in event["type"]
    )
    if item["type"] == "function_call":
        assert added["item"]["arguments"] == ""
        assert deltas == item["arguments"] == between[-1]["arguments"]
        return
    assert added["item"]["content"] == []
    assert between[0]["type"] == "response.content_part.added"
    assert between[0]["part"]["text"] == ""
    (part,) = item["content"]
    assert deltas == part["text"]
    assert [
        e["text"] for e in between if e["type"] in ("response.output_text.done", "response.reasoning_text.done")
    ] == [deltas]
    assert [e["part"] for e in between if e["type"] == "response.content_part.done"] == [part]
    if item["type"] == "message":
        logprobs = [entry for e in between if e["type"] == "response.output_text.delta" for entry in e["logprobs"]]
        assert logprobs == part["logprobs"]

"""Messages as chat templates expect them: content is text, arguments of tool calls are objects."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from amoe.errors import RequestError
from amoe.server.chat_schemas import ChatMessage

# Types of content parts, and the key of their text. Clients that replay answers of /v1/responses send the latter three.
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
# What clients replay of our own answers, and templates have no use for.
ANSWER_ONLY = ("annotations", "audio", "function_call", "refusal")


def _refuse(where: str, why: str) -> RequestError:
    return RequestError(f"{where} {why}", param=where)


def text_key(part: Any, where: str, wanted: str = "text") -> str:
    """Where the text of a content part lies.

    Args:
        wanted: what the API in use calls a part of text.

    Raises:
        RequestError: it is not text.
    """
    kind = part.get("type") if isinstance(part, dict) else None
    key = TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if key is None:
        raise _refuse(where, f"must be a part of type {wanted!r}, not {kind!r}: this server reads nothing but text")
    return key


def _part_text(part: Any, where: str) -> str:
    key = text_key(part, where)
    text = part.get(key)
    if not isinstance(text, str):
        raise _refuse(f"{where}.{key}", "must be a string")
    return text


def text_of(content: Any, where: str) -> str:
    """Text of a message's content, which is a string, a list of text parts, or null.

    Raises:
        RequestError: naming the part that is not text.
    """
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if not isinstance(content, list):
        raise _refuse(where, "must be a string or a list of parts")
    return "\n".join(_part_text(part, f"{where}.{index}") for index, part in enumerate(content))


def _arguments(text: str) -> Any:
    """The object that `text` is the JSON of, as templates want it. What is no such JSON, since the model that wrote it
    was cut off, stays text: for templates that can take it."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _tool_call(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    function = call.get("function")
    if call.get("type", "function") != "function":
        raise _refuse(f"{where}.type", f"must be 'function', not {call['type']!r}")
    if not isinstance(function, dict):
        raise _refuse(f"{where}.function", "is missing")
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str):
        raise _refuse(f"{where}.function.name", "must be a string")
    if not isinstance(arguments, str | dict | None):
        raise _refuse(f"{where}.function.arguments", "must be a string of JSON")
    parsed = arguments if isinstance(arguments, dict) else _arguments(arguments or "")
    return {**call, "type": "function", "function": {**function, "arguments": parsed}}


def _assistant(message: ChatMessage, where: str) -> dict[str, Any]:
    """What only messages of the assistant have."""
    extra = message.model_extra or {}
    for name in ("function_call", "audio"):
        if extra.get(name):
            raise _refuse(f"{where}.{name}", "is not supported by this server")
    fields: dict[str, Any] = {}
    if message.content is None and isinstance(extra.get("refusal"), str):
        fields["content"] = extra["refusal"]
    if message.tool_calls:
        calls = enumerate(message.tool_calls)
        fields["tool_calls"] = [_tool_call(call, f"{where}.tool_calls.{index}") for index, call in calls]
    thoughts = message.reasoning or message.reasoning_content
    if thoughts:  # templates differ in the name
        fields |= {"reasoning": thoughts, "reasoning_content": thoughts}
    return fields


def _template_message(message: ChatMessage, where: str) -> dict[str, Any]:
    if message.role == "function":
        raise _refuse(f"{where}.role", "must not be 'function', which is of the API before tools: use 'tool'")
    if message.content is None and message.role != "assistant":
        raise _refuse(f"{where}.content", "is missing")
    extra = {name: value for name, value in (message.model_extra or {}).items() if name not in ANSWER_ONLY}
    result = {**extra, "role": message.role, "content": text_of(message.content, f"{where}.content")}
    if message.name is not None:
        result["name"] = message.name
    if message.role == "tool" and message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    return result | (_assistant(message, where) if message.role == "assistant" else {})


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as chat templates expect them.

    Raises:
        RequestError: naming what is not text, or no tool call.
    """
    return [_template_message(message, f"messages.{index}") for index, message in enumerate(messages)]

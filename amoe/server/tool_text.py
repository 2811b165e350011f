"""Tools in plain text, for chat templates that know nothing of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from amoe.server.parsers.formats import ToolFormat

Message = dict[str, Any]


def with_tools_as_text(
    messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, format_: ToolFormat
) -> list[Message]:
    """The same conversation for a template that knows only text: a system message explains the tools, the assistant has
    written its calls, and a user brings their results."""
    plain = _without_roles(messages, format_)
    if not tools:
        return plain
    explanation = format_.explain(tools)
    if plain and plain[0]["role"] in ("system", "developer"):
        first = {**plain[0], "content": f"{plain[0]['content']}\n\n{explanation}"}
        return [first, *plain[1:]]
    return [{"role": "system", "content": explanation}, *plain]


def _without_roles(messages: Sequence[Message], format_: ToolFormat) -> list[Message]:
    names: dict[str, str] = {}  # by id of the call
    plain: list[Message] = []
    follows_result = False
    for message in messages:
        is_result = message["role"] == "tool"
        if is_result:
            name = message.get("name") or names.get(message.get("tool_call_id", ""), "the call")
            text = f"Result of {name}: {message['content']}"
            if follows_result:  # one turn of the user, since many templates want roles to alternate
                plain[-1]["content"] += f"\n{text}"
            else:
                plain.append({"role": "user", "content": text})
        else:
            names |= {call.get("id", ""): call["function"]["name"] for call in message.get("tool_calls", ())}
            plain.append(_with_calls_written(message, format_))
        follows_result = is_result
    return plain


def _with_calls_written(message: Message, format_: ToolFormat) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return message
    written = format_.write([(call["function"]["name"], call["function"]["arguments"]) for call in calls])
    content = f"{message['content']}\n{written}" if message["content"] else written
    return {**{name: value for name, value in message.items() if name != "tool_calls"}, "content": content}

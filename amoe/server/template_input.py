"""Messages as chat templates expect them."""

from __future__ import annotations

from typing import Any

from amoe.errors import RequestError
from amoe.server.schemas import ChatMessage


def _text_of(content: Any, where: str) -> str:
    """Text of a message's content, which is a string or a list of text parts."""
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a string or a list of parts", param=where)
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RequestError(
                f"{where}.{index}: only parts of type 'text' are supported, not {kind!r}", param=f"{where}.{index}"
            )
        texts.append(part["text"])
    return "\n".join(texts)


def template_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as chat templates expect them: content is text.

    Raises:
        RequestError: naming what is not supported yet (tool calls, images).
    """
    result = []
    for index, message in enumerate(messages):
        where = f"messages.{index}"
        extra = message.model_extra or {}
        for name in ("tool_calls", "function_call", "audio"):
            if extra.get(name):
                raise RequestError(f"{where}.{name} is not supported by this server", param=f"{where}.{name}")
        if message.role in ("tool", "function"):
            raise RequestError(f"{where}: the role {message.role!r} is not supported: there are no tools", where)
        if message.content is None and message.role != "assistant":
            raise RequestError(f"{where}.content is missing", param=f"{where}.content")
        text = _text_of(message.content, f"{where}.content")
        result.append({**extra, "role": message.role, "content": text})
    return result

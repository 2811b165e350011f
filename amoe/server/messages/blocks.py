"""Content blocks of Anthropic's messages, and the chat messages that they make."""

from __future__ import annotations

from typing import Any

from amoe.errors import RequestError
from amoe.server.messages.schemas import Block, Content, MessageParam
from amoe.server.template_input import text_of


def _string(block: Block, key: str, where: str) -> str:
    value = block.get(key)
    if not isinstance(value, str):
        raise RequestError(f"{where}.{key} must be a string", param=f"{where}.{key}")
    return value


class MessageBuilder:
    """Puts messages of blocks together to chat messages, and remembers where each comes from.

    Results of tools are blocks of the user there, but messages of their own in a chat.

    Attributes:
        messages: the messages so far.
        names: own path by chat path (see `FieldNames`).
    """

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.names: dict[str, str] = {}
        self._tools: dict[str, str] = {}  # name by tool_use id

    def add_system(self, content: Content) -> None:
        """The system prompt."""
        self._append({"role": "system", "content": text_of(content, "system")}, "system", "system")

    def add(self, message: MessageParam, where: str) -> None:
        """The next message, found at `where`.

        Raises:
            RequestError: naming a block that means nothing here.
        """
        content = message.content
        if isinstance(content, str):
            self._append({"role": message.role, "content": content}, where)
        elif message.role == "assistant":
            self._add_assistant(content, where)
        else:
            self._add_user(message.role, content, where)

    def _append(self, message: dict[str, Any], where: str, content_where: str | None = None) -> None:
        path = f"messages.{len(self.messages)}"
        self.names |= {path: where, f"{path}.content": content_where or f"{where}.content"}
        self.messages.append(message)

    def _add_user(self, role: str, content: list[Block], where: str) -> None:
        texts: list[str] = []

        def say() -> None:
            if texts:
                self._append({"role": role, "content": "\n".join(texts)}, where)
                texts.clear()

        for index, block in enumerate(content):
            here = f"{where}.content.{index}"
            if block.get("type") == "tool_result" and role == "user":
                say()
                self._add_result(block, here)
            else:
                texts.append(_text(block, here))
        if not content:
            self._append({"role": role, "content": ""}, where)
        say()

    def _add_result(self, block: Block, where: str) -> None:
        tool_use_id = _string(block, "tool_use_id", where)
        text = text_of(block.get("content"), f"{where}.content")
        if block.get("is_error"):
            text = f"Error: {text}"  # chats have no other way to say so
        message = {"role": "tool", "tool_call_id": tool_use_id, "content": text}
        name = self._tools.get(tool_use_id)
        self._append(message | ({} if name is None else {"name": name}), where)

    def _add_assistant(self, content: list[Block], where: str) -> None:
        texts: list[str] = []
        thoughts: list[str] = []
        calls: list[dict[str, Any]] = []
        for index, block in enumerate(content):
            here = f"{where}.content.{index}"
            kind = block.get("type")
            if kind == "thinking":
                thoughts.append(_string(block, "thinking", here))
            elif kind == "tool_use":
                self.names |= self._call_names(len(calls), here)
                calls.append(self._call(block, here))
            elif kind != "redacted_thinking":  # which nobody here can read
                texts.append(_text(block, here))
        message: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts) if texts or not calls else None}
        if thoughts:
            message["reasoning"] = "\n".join(thoughts)
        if calls:
            message["tool_calls"] = calls
        self._append(message, where)

    def _call_names(self, number: int, where: str) -> dict[str, str]:
        path = f"messages.{len(self.messages)}.tool_calls.{number}"
        return {path: where, f"{path}.function": where, f"{path}.function.arguments": f"{where}.input"}

    def _call(self, block: Block, where: str) -> dict[str, Any]:
        tool_use_id, name = _string(block, "id", where), _string(block, "name", where)
        if not isinstance(block.get("input"), dict):
            raise RequestError(f"{where}.input must be an object", param=f"{where}.input")
        self._tools[tool_use_id] = name
        return {"id": tool_use_id, "type": "function", "function": {"name": name, "arguments": block["input"]}}


def _text(block: Block, where: str) -> str:
    if block.get("type") != "text":
        raise RequestError(
            f"{where}: blocks of type {block.get('type')!r} are not supported here: this server reads nothing but text",
            param=where,
        )
    return _string(block, "text", where)

"""Items of a conversation as /v1/responses has them, and the chat messages that they make."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from amoe.errors import RequestError
from amoe.server.responses.schemas import Item
from amoe.server.template_input import text_key

# What an item's id begins with.
PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}

ROLES = ("user", "assistant", "system", "developer")


def new_item_id(kind: str) -> str:
    """A fresh id for an item of the type `kind`."""
    return f"{PREFIXES[kind]}_{uuid.uuid4().hex}"


def kind_of(item: Mapping[str, Any]) -> Any:
    """Type of an item; clients leave it out of messages and references."""
    if item.get("type") is not None:
        return item["type"]
    if "role" in item:
        return "message"
    return "item_reference" if "id" in item and set(item) <= {"id", "type"} else None


def user_message(text: str) -> Item:
    """The item that a string as `input` stands for."""
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


def completed(item: Item) -> Item:
    """`item` with what clients may leave out, as `input_items` has to tell it."""
    kind = kind_of(item)
    own_id = item.get("id")
    item_id = own_id if isinstance(own_id, str) and own_id else new_item_id(kind)
    result = {**item, "type": kind, "id": item_id, "status": "completed"}
    if kind == "message" and isinstance(item.get("content"), str):
        text_type = "output_text" if item["role"] == "assistant" else "input_text"
        annotations: dict[str, Any] = {"annotations": []} if text_type == "output_text" else {}
        result["content"] = [{"type": text_type, "text": item["content"], **annotations}]
    if kind == "reasoning":
        result.setdefault("summary", [])
    return result


def _string(item: Item, key: str, where: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise RequestError(f"{where}.{key} must be a string", param=f"{where}.{key}")
    return value


def _content(item: Item, key: str, where: str) -> Any:
    """What a message or an output says, whose parts are refused here if they are no text: in the words of this API."""
    content = item.get(key)
    wanted = "output_text" if item.get("role") == "assistant" else "input_text"
    for index, part in enumerate(content if isinstance(content, list) else ()):
        text_key(part, f"{where}.{key}.{index}", wanted)
    return content


def _thoughts(item: Item, where: str) -> str:
    """Text of a reasoning item: what was thought, or else the summary of it. Encrypted thoughts are nobody's here."""
    for key in ("content", "summary"):
        parts = item.get(key) or []
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise RequestError(f"{where}.{key} must be a list of parts", param=f"{where}.{key}")
        text = "\n".join(_string(part, "text", f"{where}.{key}.{index}") for index, part in enumerate(parts))
        if text:
            return text
    return ""


class MessageBuilder:
    """Puts items together to chat messages, and remembers which field of the request each message comes from.

    Thoughts, text and calls of one turn are items of their own here, but one message of the assistant in a chat.

    Attributes:
        messages: the messages so far.
        names: own path by chat path (see `FieldNames`).
    """

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.names: dict[str, str] = {}
        self._thoughts = ""
        self._thoughts_where = ""
        self._functions: dict[str, str] = {}  # name by call_id

    def add_text(self, role: str, text: str, where: str) -> None:
        """A message that is a field of its own, such as the instructions."""
        self._append({"role": role, "content": text}, where)
        self.names[f"messages.{len(self.messages) - 1}.content"] = where

    def add(self, item: Item, where: str) -> None:
        """The next item, found at `where`.

        Raises:
            RequestError: an item of a type that means nothing here.
        """
        kind = kind_of(item)
        if kind == "message":
            self._add_message(item, where)
        elif kind == "reasoning":
            self._add_thoughts(_thoughts(item, where), where)
        elif kind == "function_call":
            self._add_call(item, where)
        elif kind == "function_call_output":
            self._add_output(item, where)
        else:
            raise RequestError(f"{where}: items of type {kind!r} are not supported by this server", param=where)

    def finish(self) -> None:
        """There are no more items."""
        self._flush_thoughts()

    def _append(self, message: dict[str, Any], where: str) -> None:
        self.names[f"messages.{len(self.messages)}"] = where
        self.messages.append(message)

    def _add_message(self, item: Item, where: str) -> None:
        role = item.get("role")
        if role not in ROLES:
            raise RequestError(f"{where}.role must be one of {', '.join(ROLES)}, not {role!r}", param=f"{where}.role")
        message = {"role": role, "content": _content(item, "content", where)}
        if role == "assistant":
            message |= self._taken_thoughts()
        else:
            self._flush_thoughts()
        self._append(message, where)

    def _add_thoughts(self, text: str, where: str) -> None:
        self._flush_thoughts()
        self._thoughts, self._thoughts_where = text, where

    def _taken_thoughts(self) -> dict[str, str]:
        thoughts, self._thoughts = self._thoughts, ""
        return {"reasoning": thoughts} if thoughts else {}

    def _flush_thoughts(self) -> None:
        """Thoughts of a turn that said nothing, since it was cut off, are a turn all the same."""
        if self._thoughts:
            self._append({"role": "assistant", "content": "", **self._taken_thoughts()}, self._thoughts_where)

    def _add_call(self, item: Item, where: str) -> None:
        call_id, name = _string(item, "call_id", where), _string(item, "name", where)
        call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": item.get("arguments")}}
        self._functions[call_id] = name
        if self._thoughts or not self.messages or self.messages[-1]["role"] != "assistant":
            self._append({"role": "assistant", "content": None, **self._taken_thoughts()}, where)
        calls = self.messages[-1].setdefault("tool_calls", [])
        path = f"messages.{len(self.messages) - 1}.tool_calls.{len(calls)}"
        self.names |= {path: where, f"{path}.function": where}
        calls.append(call)

    def _add_output(self, item: Item, where: str) -> None:
        self._flush_thoughts()
        call_id = _string(item, "call_id", where)
        name = self._functions.get(call_id)
        message = {"role": "tool", "tool_call_id": call_id, "content": _content(item, "output", where)}
        self._append(message | ({} if name is None else {"name": name}), where)
        self.names[f"messages.{len(self.messages) - 1}.content"] = f"{where}.output"

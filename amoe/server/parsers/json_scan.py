"""Where JSON ends, in text that comes in pieces. Each character is looked at once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from typing import Literal

_IN_STRING = re.compile(r'["\\]')
_OUTSIDE = re.compile(r'["{}\[\]]')
_SCALAR_END = re.compile(r"[\s,\]}]")
_SPACE = re.compile(r"[ \t\r\n]*")
# What may stand in a call beside its name and arguments; templates of Llama's kind say "parameters".
_ARGUMENTS = ("arguments", "parameters")
_TEXTS = ("name", "type", "id")


def skip_space(text: str, start: int) -> int:
    """Position of the first character from `start` on that is not white space."""
    match = _SPACE.match(text, start)
    return match.end() if match is not None else start


class ValueScanner:
    """Finds the end of one JSON value, which starts with the first character that it is given.

    It minds strings and brackets only: what the model wrote between them is for the reader of the arguments to judge.

    Attributes:
        done: the value is complete.
    """

    def __init__(self) -> None:
        self.done = False
        self._kind: Literal["", "string", "container", "scalar"] = ""
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def scan(self, text: str, start: int) -> int:
        """Read on from `start`. Returns the position after the last character that belongs to the value."""
        if start == len(text):
            return start
        if not self._kind:
            self._kind = "string" if text[start] == '"' else "container" if text[start] in "{[" else "scalar"
        if self._kind == "scalar":
            end = _SCALAR_END.search(text, start)
            self.done = end is not None
            return len(text) if end is None else end.start()
        position = start
        while not self.done and position < len(text):
            position = self._step(text, position)
        return position

    def _step(self, text: str, start: int) -> int:
        """To the next character that matters, and over it."""
        if self._escaped:
            self._escaped = False
            return start + 1
        found = (_IN_STRING if self._in_string else _OUTSIDE).search(text, start)
        if found is None:
            return len(text)
        char = found.group()
        if char == "\\":
            self._escaped = True
        elif char == '"':
            self._in_string = not self._in_string
        else:
            self._depth += 1 if char in "{[" else -1
        self.done = self._depth == 0 and not self._in_string and not self._escaped
        return found.end()


class CallScanner:
    """Reads one `{"name": ..., "arguments": {...}}`, keys in any order.

    A call *begins* as soon as its name and the first character of its arguments are there; from then on it is one,
    whatever comes.

    Args:
        names: functions that there are; None: any name will do.

    Attributes:
        state: `open` (more is to come), `done`, or `malformed`: the next character fits no call.
        name: of the function, once the call has begun.
    """

    def __init__(self, names: Collection[str] | None) -> None:
        self.state: Literal["open", "done", "malformed"] = "open"
        self.name: str | None = None
        self._names = names
        self._next: Callable[[str, int], int] = self._brace
        self._key = ""
        self._value = ValueScanner()
        self._buffer = ""  # of the key or value that is being read
        self._known_name: str | None = None
        self._arguments = ""  # not taken yet
        self._has_arguments = False
        self._streams = False  # the value that is being read is the arguments, an object

    def feed(self, text: str, start: int) -> int:
        """Read on from `start`. Returns the position of the first character that is not part of the call."""
        position = start
        while self.state == "open" and (position := self._skip(text, position)) < len(text):
            position = self._next(text, position)
        return position

    def take_arguments(self) -> str:
        """Arguments that have come since the last time. Nothing before the call has begun."""
        if self.name is None:
            return ""
        taken, self._arguments = self._arguments, ""
        return taken

    def _skip(self, text: str, position: int) -> int:
        """Skip white space, unless it is part of a key or value."""
        return position if self._next in (self._in_key, self._in_value) else skip_space(text, position)

    def _fail(self, position: int) -> int:
        self.state = "malformed"
        return position

    def _brace(self, text: str, at: int) -> int:
        if text[at] != "{":
            return self._fail(at)
        self._next = self._before_key
        return at + 1

    def _before_key(self, text: str, at: int) -> int:
        if text[at] == "}":
            return self._close(at)
        if text[at] != '"':
            return self._fail(at)
        self._begin_value(self._in_key)
        return at

    def _begin_value(self, reader: Callable[[str, int], int]) -> None:
        self._value, self._buffer = ValueScanner(), ""
        self._next = reader

    def _in_key(self, text: str, at: int) -> int:
        end = self._value.scan(text, at)
        self._buffer += text[at:end]
        if self._value.done:
            self._key = _decoded(self._buffer) or ""
            self._next = self._colon
            if self.name is None and self._key not in (*_ARGUMENTS, *_TEXTS):
                return self._fail(end)
        return end

    def _colon(self, text: str, at: int) -> int:
        if text[at] != ":":
            return self._fail(at)
        self._next = self._before_value
        return at + 1

    def _before_value(self, text: str, at: int) -> int:
        if self._key in _ARGUMENTS and not self._has_arguments:
            if text[at] not in '{"n':  # an object, one that is written as a string, or null
                return self._fail(at)
            if text[at] == "{":
                self._arguments, self._has_arguments, self._streams = "", True, True
                self.name = self._known_name
        elif self._key in _TEXTS and self.name is None and text[at] not in '"n':
            return self._fail(at)
        self._begin_value(self._in_value)
        return at

    def _in_value(self, text: str, at: int) -> int:
        end = self._value.scan(text, at)
        piece = text[at:end]
        self._buffer += piece
        if self._streams:
            self._arguments += piece
        if self._value.done:
            self._next, self._streams = self._after_value, False
            return self._end_value(end)
        return end

    def _end_value(self, end: int) -> int:
        if self._key == "name" and self._known_name is None:
            self._known_name = _decoded(self._buffer)
            if not self._known_name or (self._names is not None and self._known_name not in self._names):
                return self._fail(end)
            if self._has_arguments:
                self.name = self._known_name
        elif self._key in _ARGUMENTS and not self._has_arguments:
            written = "{}" if self._buffer == "null" else _decoded(self._buffer)
            if written is None:
                return self._fail(end)
            self._arguments, self._has_arguments = written or "{}", True
            self.name = self._known_name
        return end

    def _after_value(self, text: str, at: int) -> int:
        if text[at] == ",":
            self._next = self._before_key
            return at + 1
        return self._close(at) if text[at] == "}" else self._fail(at)

    def _close(self, at: int) -> int:
        if self._known_name is None:
            return self._fail(at)
        if not self._has_arguments:
            self._arguments, self._has_arguments = "{}", True
        self.name = self._known_name
        self.state = "done"
        return at + 1


def _decoded(text: str) -> str | None:
    """The string that `text` is the JSON of; None if it is of none."""
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        return None
    return value if isinstance(value, str) else None

"""What all parsers of tool calls share: one pass over the text, whatever the pieces in which it comes.

A parser decides by the text that it has seen, never by where a piece ends: a stream adds up to the whole answer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from amoe.server.parsers.json_scan import CallScanner


@dataclass(slots=True)
class ToolCallDelta:
    """A piece of one tool call.

    Attributes:
        index: number of the call among those of its choice.
        id, name: set in the first piece, and only there.
        arguments: the next characters of the call's JSON arguments.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class Parsed:
    """What a piece of text has made certain."""

    content: str = ""
    calls: list[ToolCallDelta] = field(default_factory=list)


class ToolParser(Protocol):
    """Takes calls out of a text."""

    def push(self, text: str) -> Parsed:
        """The next piece of the text."""
        ...

    def finish(self) -> Parsed:
        """The text has ended: what looked like the start of a call is content."""
        ...


def partial_marker(text: str, markers: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins one of `markers` without completing it."""
    longest = min(len(text), max(len(marker) for marker in markers) - 1)
    for length in range(longest, 0, -1):
        if any(marker.startswith(text[-length:]) for marker in markers):
            return length
    return 0


class MarkedText:
    """A machine that reads text in modes. A mode looks at `text`, takes what it understands, and may set the next one.

    What has been taken since a marker is a *candidate*: it becomes content after all if no call comes of it. White
    space around calls is dropped, unless content follows.

    Args:
        new_id: makes ids of calls.
        names: functions that there are; None: any name will do.
    """

    def __init__(self, new_id: Callable[[], str], names: Collection[str] | None = None) -> None:
        self._new_id = new_id
        self._names = names
        self._parsed = Parsed()
        self._space = ""  # at the end of the content so far
        self._num_calls = 0
        self._candidate = ""
        self._scanner = CallScanner(names)
        self.text = ""
        self.mode: Callable[[], bool] = self.read_content

    def push(self, text: str) -> Parsed:
        """The next piece of the text."""
        self.text += text
        while self.text and self.mode():
            pass
        return self._take()

    def finish(self) -> Parsed:
        """The text has ended."""
        self.content(self._candidate + self.text)
        self._candidate = self.text = ""
        if not self._num_calls:
            self._parsed.content += self._space
        return self._take()

    def read_content(self) -> bool:
        """The mode outside calls. As all modes: whether there is more to do with the text at hand."""
        raise NotImplementedError

    def after_call(self) -> None:
        """A call is complete: set the mode."""
        raise NotImplementedError

    # -- for modes ---------------------------------------------------------------------------------------------------

    def skip(self, count: int) -> None:
        """Take characters into the candidate."""
        self._candidate += self.text[:count]
        self.text = self.text[count:]

    def pass_on(self, count: int) -> None:
        """Take characters as content."""
        self.content(self.text[:count])
        self.text = self.text[count:]

    def reject(self) -> bool:
        """The candidate is content after all."""
        self.content(self._candidate)
        self._candidate = ""
        self.mode = self.read_content
        return True

    def content(self, text: str) -> None:
        """Text for people."""
        text = self._space + text
        written = text.rstrip()
        self._space = text[len(written) :]
        self._parsed.content += written

    def begin(self, name: str) -> None:
        """A call, of which arguments are to come."""
        self._candidate = ""
        self._parsed.calls.append(ToolCallDelta(self._num_calls, self._new_id(), name))
        self._num_calls += 1

    def arguments(self, text: str) -> None:
        """More arguments of the call that has begun last."""
        if not text:
            return
        calls = self._parsed.calls
        if not calls:
            calls.append(ToolCallDelta(self._num_calls - 1))
        calls[-1].arguments += text

    def expect_object(self) -> None:
        """A call written as one JSON object comes next."""
        self._scanner = CallScanner(self._names)
        self.mode = self._read_object

    def _read_object(self) -> bool:
        scanner = self._scanner
        had_begun = scanner.name is not None
        taken = scanner.feed(self.text, 0)
        if scanner.name is None:
            self.skip(taken)
        else:
            self.text = self.text[taken:]
            if not had_begun:
                self.begin(scanner.name)
            self.arguments(scanner.take_arguments())
        if scanner.state == "malformed":
            return self.reject()
        if scanner.state == "done":
            self.after_call()
        return scanner.state == "done"

    def _take(self) -> Parsed:
        parsed, self._parsed = self._parsed, Parsed()
        return parsed

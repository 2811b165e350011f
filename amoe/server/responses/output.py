"""Items of a response while they grow, and the events that tell of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, Protocol

from amoe.server.responses.items import new_item_id

ItemStatus = Literal["completed", "incomplete"]
Event = dict[str, Any]


class Emit(Protocol):
    """Makes an event of its type and fields, and numbers it."""

    def __call__(self, kind: str, **fields: Any) -> Event: ...


class OpenItem:
    """An item that is not complete yet.

    Attributes:
        body: the item as it is now; it stands in the response, too.
        index: its place in the response's output.
    """

    def __init__(self, kind: str, index: int, emit: Emit, **fields: Any) -> None:
        self.index = index
        self.body: dict[str, Any] = {"type": kind, "id": new_item_id(kind), "status": "in_progress", **fields}
        self._emit = emit

    def begin(self) -> list[Event]:
        """It is there now."""
        return [self._emit("response.output_item.added", output_index=self.index, item=self._snapshot())]

    def end(self, status: ItemStatus) -> list[Event]:
        """Nothing more comes."""
        parts = self._end_parts()
        self.body["status"] = status
        return [*parts, self._emit("response.output_item.done", output_index=self.index, item=self._snapshot())]

    def _end_parts(self) -> list[Event]:
        raise NotImplementedError

    def _snapshot(self) -> dict[str, Any]:
        """A copy that does not grow: events may be kept."""
        copies = {key: [dict(part) for part in value] for key, value in self.body.items() if isinstance(value, list)}
        return {**self.body, **copies}

    def _tell(self, kind: str, **fields: Any) -> Event:
        return self._emit(kind, item_id=self.body["id"], output_index=self.index, **fields)


class OpenMessage(OpenItem):
    """Text for the user."""

    def __init__(self, index: int, emit: Emit) -> None:
        super().__init__("message", index, emit, role="assistant", content=[])

    def begin(self) -> list[Event]:
        """It is there now, with its only part."""
        added = super().begin()
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self.body["content"].append(part)
        return [*added, self._tell("response.content_part.added", content_index=0, part=self._part())]

    def _part(self) -> dict[str, Any]:
        part = self.body["content"][0]
        return {**part, "logprobs": list(part["logprobs"])}

    def add(self, text: str, logprobs: Sequence[dict[str, Any]]) -> list[Event]:
        """More text, and the log-probabilities of the tokens that brought it."""
        part = self.body["content"][0]
        part["text"] += text
        part["logprobs"] += logprobs
        return [self._tell("response.output_text.delta", content_index=0, delta=text, logprobs=list(logprobs))]

    def _end_parts(self) -> list[Event]:
        part = self._part()
        text, logprobs = part["text"], part["logprobs"]
        return [
            self._tell("response.output_text.done", content_index=0, text=text, logprobs=logprobs),
            self._tell("response.content_part.done", content_index=0, part=part),
        ]


class OpenReasoning(OpenItem):
    """What the model thinks. Where a summary is wanted, the thoughts stand in for it when they are complete."""

    def __init__(self, index: int, emit: Emit, *, with_summary: bool) -> None:
        super().__init__("reasoning", index, emit, summary=[], content=[], encrypted_content=None)
        self._with_summary = with_summary

    def begin(self) -> list[Event]:
        """It is there now, with its only part."""
        added = super().begin()
        part = {"type": "reasoning_text", "text": ""}
        self.body["content"].append(part)
        return [*added, self._tell("response.content_part.added", content_index=0, part=dict(part))]

    def add(self, text: str) -> list[Event]:
        """More thoughts."""
        self.body["content"][0]["text"] += text
        return [self._tell("response.reasoning_text.delta", content_index=0, delta=text)]

    def _end_parts(self) -> list[Event]:
        part = dict(self.body["content"][0])
        done = [
            self._tell("response.reasoning_text.done", content_index=0, text=part["text"]),
            self._tell("response.content_part.done", content_index=0, part=part),
        ]
        return done + (self._summary(part["text"]) if self._with_summary else [])

    def _summary(self, text: str) -> list[Event]:
        part = {"type": "summary_text", "text": text}
        self.body["summary"].append(part)
        return [
            self._tell("response.reasoning_summary_part.added", summary_index=0, part={**part, "text": ""}),
            self._tell("response.reasoning_summary_text.delta", summary_index=0, delta=text),
            self._tell("response.reasoning_summary_text.done", summary_index=0, text=text),
            self._tell("response.reasoning_summary_part.done", summary_index=0, part=dict(part)),
        ]


class OpenCall(OpenItem):
    """A call of a function."""

    def __init__(self, index: int, emit: Emit, call_id: str, name: str) -> None:
        super().__init__("function_call", index, emit, call_id=call_id, name=name, arguments="")

    def end(self, status: ItemStatus) -> list[Event]:
        """Nothing more comes. Arguments that are whole stay so, where the answer was cut off behind them."""
        return super().end("completed" if _is_json(self.body["arguments"]) else status)

    def add(self, arguments: str) -> list[Event]:
        """More of the arguments."""
        self.body["arguments"] += arguments
        return [self._tell("response.function_call_arguments.delta", delta=arguments)]

    def _end_parts(self) -> list[Event]:
        arguments, name = self.body["arguments"], self.body["name"]
        return [self._tell("response.function_call_arguments.done", arguments=arguments, name=name)]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True

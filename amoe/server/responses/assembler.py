"""From the deltas of a conversation to a response, and to the events of its stream. No I/O."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from amoe.engine.generation import GenerationDelta
from amoe.server.conversation import ChatDelta, ToolCallDelta
from amoe.server.errors import describe
from amoe.server.responses.output import Event, ItemStatus, OpenCall, OpenItem, OpenMessage, OpenReasoning

# Log-probabilities of the tokens of a delta, as in the response.
FormatLogprobs = Callable[[GenerationDelta], list[dict[str, Any]]]


class ResponseAssembler:
    """Builds one response. A response that is not streamed is built by the same events, which nobody reads.

    Args:
        head: the response without any output (`render.response_head`).
        format_logprobs: None: not asked for.
        with_summary: thoughts stand in for a summary of them.
    """

    def __init__(
        self, head: Mapping[str, Any], format_logprobs: FormatLogprobs | None = None, *, with_summary: bool = False
    ) -> None:
        self.error: Exception | None = None
        self._body: dict[str, Any] = {**head, "status": "queued", "output": []}
        self._format_logprobs = format_logprobs
        self._with_summary = with_summary
        self._logprobs: list[dict[str, Any]] = []  # of tokens whose text is held back
        self._open: OpenItem | None = None
        self._call_index = -1
        self._num_events = 0

    @property
    def id(self) -> str:
        """Of the response."""
        return self._body["id"]

    @property
    def is_over(self) -> bool:
        """The response does not change any more."""
        return self._body["status"] not in ("queued", "in_progress")

    @property
    def body(self) -> dict[str, Any]:
        """The response as it is now."""
        return {**self._body, "output": list(self._body["output"])}

    def _emit(self, kind: str, **fields: Any) -> Event:
        number = self._num_events
        self._num_events += 1
        return {"type": kind, "sequence_number": number, **fields}

    def begin(self) -> list[Event]:
        """The response is there."""
        self._body["status"] = "in_progress"
        kinds = ("response.created", "response.in_progress")
        return [self._emit(kind, response=self.body) for kind in kinds]

    def push(self, delta: ChatDelta) -> list[Event]:
        """What `delta` brings."""
        if self._format_logprobs is not None:
            self._logprobs += self._format_logprobs(delta.raw)
        events: list[Event] = []
        if delta.reasoning:
            events += self._think(delta.reasoning)
        if delta.content:
            events += self._say(delta.content)
        for piece in delta.tool_calls:
            events += self._call(piece)
        return events

    def _begin_item(self, item: OpenItem) -> list[Event]:
        ended = self._end_item("completed")
        self._open = item
        begun = item.begin()
        self._body["output"].append(item.body)
        return ended + begun

    def _end_item(self, status: ItemStatus) -> list[Event]:
        item, self._open = self._open, None
        return [] if item is None else item.end(status)

    @property
    def _next_index(self) -> int:
        return len(self._body["output"])

    def _think(self, text: str) -> list[Event]:
        self._logprobs.clear()  # they are told of text for the user only
        events = []
        if not isinstance(self._open, OpenReasoning):
            events += self._begin_item(OpenReasoning(self._next_index, self._emit, with_summary=self._with_summary))
        assert isinstance(self._open, OpenReasoning)
        return events + self._open.add(text)

    def _say(self, text: str) -> list[Event]:
        logprobs, self._logprobs = self._logprobs, []
        events = []
        if not isinstance(self._open, OpenMessage):
            events += self._begin_item(OpenMessage(self._next_index, self._emit))
        assert isinstance(self._open, OpenMessage)
        return events + self._open.add(text, logprobs)

    def _call(self, piece: ToolCallDelta) -> list[Event]:
        self._logprobs.clear()
        events = []
        if piece.index != self._call_index:
            self._call_index = piece.index
            events += self._begin_item(OpenCall(self._next_index, self._emit, piece.id or "", piece.name or ""))
        assert isinstance(self._open, OpenCall)
        return events + (self._open.add(piece.arguments) if piece.arguments else [])

    def finish(self, finish_reason: str | None, usage: Mapping[str, Any]) -> list[Event]:
        """The model has ended, for `finish_reason`."""
        events = []
        if self._logprobs and isinstance(self._open, OpenMessage):
            events += self._say("")  # the token that ended the text
        if not self._body["output"]:
            events += self._begin_item(OpenMessage(0, self._emit))
        is_cut = finish_reason == "length"
        events += self._end_item("incomplete" if is_cut else "completed")
        self._body["usage"] = dict(usage)
        if is_cut:
            self._body |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
        else:
            self._body |= {"status": "completed", "completed_at": int(time.time())}
        return [*events, self._emit(f"response.{self._body['status']}", response=self.body)]

    def fail(self, error: Exception) -> list[Event]:
        """The answer broke off. `error` is kept, for whoever can still tell it by a status."""
        self.error = error
        status, content = describe(error)
        message, param = content["error"]["message"], content["error"]["param"]
        code = "server_error" if status >= 500 else "invalid_prompt"  # OpenAI has no other word for it
        events = self._end_item("incomplete")
        self._body |= {"status": "failed", "error": {"code": code, "message": message}}
        return [
            *events,
            self._emit("error", code=code, message=message, param=param),
            self._emit("response.failed", response=self.body),
        ]

    def cancel(self) -> None:
        """Nobody wants the rest."""
        self._end_item("incomplete")
        self._body["status"] = "cancelled"

"""From the deltas of a conversation to a message, and to the events of its stream. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic_core import from_json

from amoe.server.conversation import ChatDelta, ToolCallDelta

Event = dict[str, Any]


def tool_input(arguments: str) -> dict[str, Any]:
    """What the model has written as arguments, as an object; as far as it goes, if the model was cut off."""
    try:
        value = from_json(arguments or "{}", allow_partial=True)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


class MessageAssembler:
    """Builds one message. A message that is not streamed is built by the same events, which nobody reads.

    Args:
        stop_sequences: of the request.
    """

    def __init__(self, message_id: str, model: str, num_prompt_tokens: int, stop_sequences: list[str]) -> None:
        self._stop_sequences = stop_sequences
        self._arguments = ""  # of the call that is open
        self._call_index = -1
        self._is_open = False
        self._message: dict[str, Any] = {
            "id": message_id,
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(num_prompt_tokens),
        }

    @property
    def message(self) -> dict[str, Any]:
        """The message as it is now."""
        return {**self._message, "content": list(self._message["content"])}

    def begin(self) -> list[Event]:
        """The message is there."""
        return [{"type": "message_start", "message": self.message}, {"type": "ping"}]

    def push(self, delta: ChatDelta) -> list[Event]:
        """What `delta` brings."""
        events: list[Event] = []
        if delta.reasoning:
            events += self._grow("thinking", "thinking", delta.reasoning, signature="")
        if delta.content:
            events += self._grow("text", "text", delta.content)
        for piece in delta.tool_calls:
            events += self._call(piece)
        return events

    @property
    def _blocks(self) -> list[dict[str, Any]]:
        return self._message["content"]

    def _begin_block(self, kind: str, **fields: Any) -> list[Event]:
        ended = self._end_block()
        self._blocks.append({"type": kind, **fields})
        self._is_open = True
        start = {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": {**self._blocks[-1]}}
        return [*ended, start]

    def _end_block(self) -> list[Event]:
        if not self._is_open:
            return []
        self._is_open = False
        block = self._blocks[-1]
        if block["type"] == "tool_use":
            block["input"] = tool_input(self._arguments)
        return [{"type": "content_block_stop", "index": len(self._blocks) - 1}]

    def _delta(self, kind: str, **fields: Any) -> Event:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": {"type": kind, **fields}}

    def _grow(self, kind: str, key: str, text: str, **fields: Any) -> list[Event]:
        """More of a text or of thoughts, in the block that is open or a new one."""
        is_same = self._is_open and self._blocks[-1]["type"] == kind
        events = [] if is_same else self._begin_block(kind, **{key: ""}, **fields)
        self._blocks[-1][key] += text
        return [*events, self._delta(f"{kind}_delta", **{key: text})]

    def _call(self, piece: ToolCallDelta) -> list[Event]:
        events: list[Event] = []
        if piece.index != self._call_index:
            events += self._begin_block("tool_use", id=piece.id, name=piece.name, input={})
            self._call_index, self._arguments = piece.index, ""
        self._arguments += piece.arguments
        return events + ([self._delta("input_json_delta", partial_json=piece.arguments)] if piece.arguments else [])

    def finish(
        self, finish_reason: str | None, stop: str | int | None, usage: Mapping[str, Any], num_thinking_tokens: int
    ) -> list[Event]:
        """The model has ended.

        Args:
            finish_reason: of the chat completion.
            stop: the stop string or token that ended it, if one did.
            usage: of the chat completion.
            num_thinking_tokens: of those generated.
        """
        events = self._end_block()
        if not self._blocks:
            events += [*self._begin_block("text", text=""), *self._end_block()]
        reason = self._stop_reason(finish_reason, stop)
        ending = {"stop_reason": reason, "stop_sequence": stop if reason == "stop_sequence" else None}
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        counts = _usage(usage["prompt_tokens"], cached, usage["completion_tokens"], num_thinking_tokens)
        counts |= {"capacity": usage["capacity"]} if "capacity" in usage else {}
        self._message |= {**ending, "usage": counts}
        return [*events, {"type": "message_delta", "delta": ending, "usage": counts}, {"type": "message_stop"}]

    def _stop_reason(self, finish_reason: str | None, stop: str | int | None) -> str:
        if finish_reason == "length":
            return "max_tokens"
        if finish_reason == "stop" and stop in self._stop_sequences:
            return "stop_sequence"
        # By the blocks: a chat completion that was told which tool to call ends with `stop`, as OpenAI's does.
        return "tool_use" if any(block["type"] == "tool_use" for block in self._blocks) else "end_turn"


def _usage(num_prompt: int, num_cached: int = 0, num_generated: int = 0, num_thinking: int = 0) -> dict[str, Any]:
    """Anthropic counts cached tokens apart from the others. Nothing is charged for writing to the prefix cache."""
    return {
        "input_tokens": num_prompt - num_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": num_cached,
        "output_tokens": num_generated,
        "output_tokens_details": {"thinking_tokens": num_thinking},
    }

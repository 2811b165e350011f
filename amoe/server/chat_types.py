"""What comes out of a conversation: choices, whole or piece by piece."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from amoe.engine.generation import GenerationDelta
from amoe.server.parsers.base import ToolCallDelta

ChatFinishReason = Literal["stop", "length", "tool_calls", "abort", "error"]


@dataclass(slots=True)
class ChatDelta:
    """What is new in one choice.

    Attributes:
        index: number of the choice.
        raw: the delta of the generation that this is made of: tokens, log-probabilities, counts, stop reason.
        reasoning, content: new text; both may lag behind the tokens of `raw`.
        tool_calls: pieces of tool calls, in order.
        finish_reason: set in the choice's last delta only.
        reasoning_tokens: tokens of the choice so far that were thoughts.
    """

    index: int
    raw: GenerationDelta
    reasoning: str = ""
    content: str = ""
    tool_calls: list[ToolCallDelta] = field(default_factory=list)
    finish_reason: ChatFinishReason | None = None
    reasoning_tokens: int = 0


@dataclass(slots=True)
class ToolCall:
    """A whole tool call; `arguments` is JSON."""

    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class ChatChoice:
    """A whole choice. `raw` has the text as the model wrote it, and all its tokens."""

    index: int
    raw: GenerationDelta
    reasoning: str = ""
    content: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    finish_reason: ChatFinishReason | None = None
    reasoning_tokens: int = 0

    def add(self, delta: ChatDelta) -> None:
        """Append what is new."""
        self.reasoning += delta.reasoning
        self.content += delta.content
        for piece in delta.tool_calls:
            if piece.index == len(self.tool_calls):
                self.tool_calls.append(ToolCall(piece.id or "", piece.name or "", ""))
            self.tool_calls[piece.index].arguments += piece.arguments
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.reasoning_tokens = delta.reasoning_tokens
        if delta.raw is not self.raw:
            self.raw.merge(delta.raw)

"""From the text of one choice to thoughts, content and tool calls, piece by piece."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from amoe.engine.generation import GenerationDelta
from amoe.server.chat_types import ChatDelta, ChatFinishReason
from amoe.server.parsers.base import Parsed, ToolParser
from amoe.server.parsers.formats import ToolFormat
from amoe.server.parsers.reasoning import ReasoningFormat, ReasoningParser, ReasoningTokens
from amoe.server.tools import ToolPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerFormat:
    """How the answers to one request are read.

    Attributes:
        plan: whether there may be tool calls ...
        tools: ... and how they are written.
        reasoning: how thoughts are marked; None: there are none.
        inside: where answers start, as `ReasoningFormat.is_inside` says.
        include_reasoning: whether the client wants to see thoughts.
    """

    plan: ToolPlan
    tools: ToolFormat
    reasoning: ReasoningFormat | None = None
    inside: bool | None = None
    include_reasoning: bool = True


class AnswerReader:
    """Reads one choice.

    Args:
        token_bytes: the UTF-8 bytes of a token.
    """

    def __init__(self, index: int, answers: AnswerFormat, token_bytes: Callable[[int], bytes]) -> None:
        self._index = index
        self._answers = answers
        plan, marks = answers.plan, answers.reasoning
        self._tools: ToolParser | None = None if plan.mode == "none" else answers.tools.parser(plan.names)
        self._thoughts: ReasoningParser | None = None
        self._tokens: ReasoningTokens | None = None
        if marks is not None:
            self._thoughts = ReasoningParser(marks, answers.inside)
            self._tokens = ReasoningTokens(marks, answers.inside, token_bytes)
        self._has_called = False

    def read(self, raw: GenerationDelta) -> ChatDelta:
        """What `raw` brings."""
        delta = ChatDelta(self._index, raw, content=raw.text, finish_reason=raw.finish_reason)
        if self._thoughts is None and self._tools is None:
            return delta
        is_last = raw.finish_reason is not None
        if self._thoughts is not None and self._tokens is not None:
            self._tokens.push(raw.token_ids)
            delta.reasoning_tokens = self._tokens.count
            delta.reasoning, delta.content = self._split(self._thoughts, raw.text, is_last=is_last)
        if self._tools is not None:
            parsed = self._parse(self._tools, delta.content, is_last=is_last)
            delta.content, delta.tool_calls = parsed.content, parsed.calls
            self._has_called = self._has_called or bool(parsed.calls)
        delta.finish_reason = self._finish_reason(raw)
        return delta

    def _split(self, parser: ReasoningParser, text: str, *, is_last: bool) -> tuple[str, str]:
        reasoning, content = parser.push(text)
        if is_last:
            more_reasoning, more_content = parser.finish()
            reasoning, content = reasoning + more_reasoning, content + more_content
        return reasoning if self._answers.include_reasoning else "", content

    def _parse(self, parser: ToolParser, text: str, *, is_last: bool) -> Parsed:
        parsed = parser.push(text)
        if is_last:
            rest = parser.finish()
            parsed = Parsed(parsed.content + rest.content, parsed.calls + rest.calls)
        if self._answers.plan.is_forced:
            # Nothing but calls can be meant: the rest is the head of one that was cut off, or stands between two.
            parsed.content = ""
        return parsed

    def _finish_reason(self, raw: GenerationDelta) -> ChatFinishReason | None:
        """OpenAI's: a function that the client has named itself is no reason to tell."""
        if raw.finish_reason == "stop" and self._has_called and self._answers.plan.mode != "named":
            return "tool_calls"
        return raw.finish_reason

"""Deltas of conversations, made by hand: what the three chat APIs render."""

from __future__ import annotations

from amoe.engine.generation import GenerationDelta
from amoe.server.conversation import ChatDelta, ToolCallDelta
from amoe.types import TokenLogprobs


def raw(num_tokens: int = 1) -> GenerationDelta:
    """So many tokens, with log-probabilities."""
    logprobs = [TokenLogprobs(-0.5, [7], [-0.5]) for _ in range(num_tokens)]
    return GenerationDelta(token_ids=[7] * num_tokens, logprobs=logprobs, num_prompt_tokens=5)


def think(text: str) -> ChatDelta:
    return ChatDelta(0, raw(), reasoning=text)


def say(text: str, finish_reason=None) -> ChatDelta:
    return ChatDelta(0, raw(), content=text, finish_reason=finish_reason)


def call(index: int, name: str | None, arguments: str, finish_reason=None) -> ChatDelta:
    """A piece of a call; the first of each has its name."""
    call_id = None if name is None else f"call_{index}"
    return ChatDelta(0, raw(), tool_calls=[ToolCallDelta(index, call_id, name, arguments)], finish_reason=finish_reason)


def nothing(finish_reason=None) -> ChatDelta:
    """Tokens whose text is held back."""
    return ChatDelta(0, raw(), finish_reason=finish_reason)


USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 7,
    "total_tokens": 12,
    "prompt_tokens_details": {"cached_tokens": 2},
}

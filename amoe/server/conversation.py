"""A conversation on its way through the engine: what /v1/chat/completions, /v1/responses and /v1/messages share.

The three endpoints differ in what they read and write, not in what happens: the other two translate their request into
a `ChatCompletionRequest`, and `ChatDelta`s into their own events.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from amoe.engine.async_engine import Generation
from amoe.engine.generation import GenerationDelta
from amoe.engine.tokenizer import Tokenizer
from amoe.errors import RequestError
from amoe.policy.admission import fitting_max_tokens
from amoe.server.chat_schemas import ChatCompletionRequest
from amoe.server.constraints import constraints_of
from amoe.server.context import ServerContext
from amoe.server.sampling import check_spans, sampling_params
from amoe.server.streaming import interleave
from amoe.server.template_input import template_messages

ChatFinishReason = Literal["stop", "length", "tool_calls", "abort", "error"]


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
class ChatDelta:
    """What is new in one choice.

    Attributes:
        index: number of the choice.
        raw: the delta of the generation that this is made of: tokens, log-probabilities, counts, stop reason.
        reasoning, content: new text; both may lag behind the tokens of `raw`.
        tool_calls: pieces of tool calls, in order.
        finish_reason: set in the choice's last delta only.
    """

    index: int
    raw: GenerationDelta
    reasoning: str = ""
    content: str = ""
    tool_calls: list[ToolCallDelta] = field(default_factory=list)
    finish_reason: ChatFinishReason | None = None


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

    def add(self, delta: ChatDelta) -> None:
        """Append what is new."""
        self.reasoning += delta.reasoning
        self.content += delta.content
        for piece in delta.tool_calls:
            if piece.index == len(self.tool_calls):
                self.tool_calls.append(ToolCall(piece.id or "", piece.name or "", ""))
            self.tool_calls[piece.index].arguments += piece.arguments
        self.finish_reason = delta.finish_reason or self.finish_reason
        if delta.raw is not self.raw:
            self.raw.merge(delta.raw)


@dataclass(slots=True)
class ChatJob:
    """A conversation that the engine has admitted.

    Attributes:
        request: what was asked for.
        model: the served name that it meant.
        created: Unix time.
        prompt_token_ids: of the rendered conversation.
        generations: one per choice. Whoever does not read them to their end has to close them.
    """

    request: ChatCompletionRequest
    model: str
    created: int
    prompt_token_ids: list[int]
    generations: list[Generation]
    tokenizer: Tokenizer

    async def deltas(self) -> AsyncGenerator[ChatDelta]:
        """What is new, as it comes, choices interleaved."""
        async with contextlib.aclosing(interleave(self.generations)) as deltas:
            async for index, raw in deltas:
                yield ChatDelta(index, raw, content=raw.text, finish_reason=raw.finish_reason)

    async def collect(self) -> list[ChatChoice]:
        """All choices, whole. Frees all of them if one fails, or the caller is cancelled."""
        choices: dict[int, ChatChoice] = {}
        try:
            async with contextlib.aclosing(self.deltas()) as deltas:
                async for delta in deltas:
                    choices.setdefault(delta.index, ChatChoice(delta.index, delta.raw)).add(delta)
        finally:
            close_all(self.generations)
        return [choices[index] for index in sorted(choices)]


def close_all(generations: Sequence[Generation]) -> None:
    """Free what has not ended."""
    for generation in generations:
        generation.close()


async def start_chat(context: ServerContext, body: ChatCompletionRequest) -> ChatJob:
    """Render, tokenize and admit a conversation.

    Raises:
        RequestError: naming the field of the chat request.
        EngineOverloadedError, EngineDeadError: no room.
    """
    model = context.resolve_model(body.model)
    engine = context.engine
    for name in ("tools", "chat_template", "continue_final_message", "echo"):
        if getattr(body, name):
            raise RequestError(f"{name} is not supported by this server: leave it out", param=name)
    variables: dict[str, Any] = {"add_generation_prompt": body.add_generation_prompt, "documents": body.documents}
    if body.reasoning_effort is not None:
        variables["reasoning_effort"] = body.reasoning_effort
    variables.update(body.chat_template_kwargs or {})
    text = engine.tokenizer.render_chat(template_messages(body.messages), variables)
    prompt = await context.tokenize(text, body.add_special_tokens, "messages")
    check_spans(body, [len(prompt)])
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if max_tokens is None:
        max_tokens = fitting_max_tokens(len(prompt), engine.model.max_model_len, "messages")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    constraints = await constraints_of(context, body)
    starts = [
        (prompt, sampling_params(body, context.defaults, max_tokens, logprobs, choice, constraints=constraints))
        for choice in range(body.n)
    ]
    generations = context.start(starts, param="messages")
    return ChatJob(body, model, int(time.time()), prompt, generations, engine.tokenizer)

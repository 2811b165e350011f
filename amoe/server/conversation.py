"""A conversation on its way through the engine: what /v1/chat/completions, /v1/responses and /v1/messages share.

The three endpoints differ in what they read and write, not in what happens: the other two translate their request into
a `ChatCompletionRequest`, and `ChatDelta`s into their own events.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace

from amoe.engine.async_engine import ModelInfo
from amoe.engine.async_generation import Generation
from amoe.engine.tokenizer import Tokenizer
from amoe.errors import RequestError
from amoe.policy.admission import fitting_max_tokens
from amoe.server.answer import AnswerFormat, AnswerReader
from amoe.server.chat_grammar import chat_grammar
from amoe.server.chat_schemas import ChatCompletionRequest
from amoe.server.chat_types import ChatChoice as ChatChoice
from amoe.server.chat_types import ChatDelta as ChatDelta
from amoe.server.chat_types import ChatFinishReason as ChatFinishReason
from amoe.server.chat_types import ToolCall as ToolCall
from amoe.server.constraints import constraints_of
from amoe.server.context import ServerContext
from amoe.server.parsers.base import ToolCallDelta as ToolCallDelta
from amoe.server.rendering import RenderedChat, render_chat
from amoe.server.sampling import check_spans, sampling_params, truncated
from amoe.server.streaming import interleave
from amoe.server.tools import argument_rules


@dataclass(slots=True)
class ChatJob:
    """A conversation that the engine has admitted.

    Attributes:
        request: what was asked for.
        model: the served name that it meant.
        created: Unix time.
        prompt_token_ids: of the rendered conversation.
        generations: one per choice. Whoever does not read them to their end has to close them.
        answers: how their text is read.
    """

    request: ChatCompletionRequest
    model: str
    created: int
    prompt_token_ids: list[int]
    generations: list[Generation]
    tokenizer: Tokenizer
    model_info: ModelInfo
    answers: AnswerFormat

    async def deltas(self) -> AsyncGenerator[ChatDelta]:
        """What is new, as it comes, choices interleaved."""
        token_bytes = self.tokenizer.token_bytes
        readers = [AnswerReader(index, self.answers, token_bytes) for index in range(len(self.generations))]
        async with contextlib.aclosing(interleave(self.generations)) as deltas:
            async for index, raw in deltas:
                yield readers[index].read(raw)

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
    rendered = await render_chat(context, body, parallel=body.parallel_tool_calls)
    answers = _answer_format(context, body, rendered)
    prompt = await context.tokenize(rendered.text, body.add_special_tokens, "messages")
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    prompt = truncated(body, prompt, engine.model.max_model_len, max_tokens or 1)
    check_spans(body, [len(prompt)])
    if max_tokens is None:
        max_tokens = fitting_max_tokens(len(prompt), engine.model.max_model_len, "messages")
    constraints = await constraints_of(context, body)
    marks = _special_marks(engine.tokenizer, answers)
    constraints = replace(constraints, grammar=await _grammar(context, answers, constraints.grammar, marks))
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    starts = [
        (
            prompt,
            replace(
                sampling_params(body, context.defaults, max_tokens, logprobs, choice, constraints=constraints),
                visible_token_ids=tuple(marks.values()),
            ),
        )
        for choice in range(body.n)
    ]
    generations = context.start(starts, param="messages")
    return ChatJob(body, model, int(time.time()), prompt, generations, engine.tokenizer, engine.model, answers)


def _answer_format(context: ServerContext, body: ChatCompletionRequest, rendered: RenderedChat) -> AnswerFormat:
    reasoning = context.chat.reasoning
    return AnswerFormat(
        plan=rendered.plan,
        tools=rendered.tools,
        reasoning=reasoning,
        inside=None if reasoning is None else reasoning.is_inside(rendered.text),
        include_reasoning=body.include_reasoning,
    )


def _special_marks(tokenizer: Tokenizer, answers: AnswerFormat) -> dict[str, int]:
    """Ids of marks that are special tokens: they have to stay in the text for us to see."""
    marks = () if answers.plan.mode == "none" else answers.tools.marks
    if answers.reasoning is not None:
        marks = (*marks, answers.reasoning.start, answers.reasoning.end)
    found = {mark: tokenizer.special_token_id(mark) for mark in marks}
    return {mark: token_id for mark, token_id in found.items() if token_id is not None}


async def _grammar(
    context: ServerContext, answers: AnswerFormat, answer: str | None, marks: Mapping[str, int]
) -> str | None:
    """The grammar of the whole answer.

    Args:
        answer: what the request says that its text must be.
    """
    plan = answers.plan
    formats = (plan, answers.tools, answer, answers.reasoning, answers.inside)
    grammar = chat_grammar(*formats, marks)
    if grammar is None or grammar == answer:
        return grammar
    # The check knows no model's tokens: there all marks are text.
    complaint = await context.check_grammar(chat_grammar(*formats, {}) or "")
    if complaint is None:
        return grammar
    for index, function in plan.functions:  # which of them is it?
        where = f"tools.{index}.function.parameters"
        rule = f"start: arguments_0\n{argument_rules([(index, function)])}"
        if (reason := await context.check_grammar(rule)) is not None:
            raise RequestError(f"{where} cannot be enforced: {reason}", param=where)
    raise RequestError(f"tools: together they cannot be enforced: {complaint}", param="tools")

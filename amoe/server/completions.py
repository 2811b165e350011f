"""POST /v1/completions."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response

from amoe.engine.async_generation import Generation
from amoe.engine.generation import GenerationDelta
from amoe.errors import RequestError
from amoe.policy.admission import fitting_max_tokens
from amoe.server import fields
from amoe.server.completion_choices import ChoiceWriter
from amoe.server.completion_schemas import CompletionRequest
from amoe.server.constraints import constraints_of
from amoe.server.context import ServerContext, new_id
from amoe.server.encoding import event, json_response
from amoe.server.logprobs import FEW_LOGPROBS
from amoe.server.openapi import responses
from amoe.server.sampling import Constraints, check_spans, sampling_params, truncated
from amoe.server.streaming import EventStream, UsageCounter, collect, interleave, unless_disconnected
from amoe.types import SamplingParams

DEFAULT_MAX_TOKENS = 16  # OpenAI's
PROMPTS_AT_ONCE = 32  # tokenized without letting the event loop go on: some milliseconds

EXAMPLE = {
    "id": "cmpl-1",
    "object": "text_completion",
    "created": 1700000000,
    "model": "tiny",
    "choices": [{"index": 0, "text": " there", "logprobs": None, "finish_reason": "length", "stop_reason": None}],
    "usage": {
        "prompt_tokens": 2,
        "completion_tokens": 1,
        "total_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 0},
    },
}


@dataclass(slots=True)
class _Job:
    """A request that the engine has admitted. Choice i belongs to prompt i // n."""

    request: CompletionRequest
    head: dict[str, Any]
    generations: list[Generation]
    writers: list[ChoiceWriter]

    async def part(self, index: int, delta: GenerationDelta) -> dict[str, Any] | None:
        """What `delta` adds to `choices[index]`, if anything."""
        writer = self.writers[index]
        if writer.scores_prompt or (self.request.logprobs and len(delta.token_ids) > FEW_LOGPROBS):
            return await asyncio.to_thread(writer.part, delta)
        return writer.part(delta)


def completions_router(context: ServerContext) -> APIRouter:
    """The route, over `context`."""
    router = APIRouter()

    @router.post("/v1/completions", response_model=None, responses=responses(EXAMPLE, streams=True))
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue one prompt or several."""
        fields.check_extra(body, fields.COMPLETIONS)
        if body.echo and body.logprobs is not None and body.n > 1:
            raise RequestError("echo with logprobs would score the prompt for every choice: ask with n = 1", param="n")
        if body.stream:
            job = await _start(context, body)
            return EventStream(_events(job), job.generations)
        return await unless_disconnected(request, _complete(context, body))

    return router


async def _start(context: ServerContext, body: CompletionRequest) -> _Job:
    model = context.resolve_model(body.model)
    context.engine.check_count(len(body.prompt) * body.n, "prompt" if len(body.prompt) > 1 else "n")
    prompts = await _prompts(context, body)
    check_spans(body, [len(prompt) for prompt in prompts])
    constraints = await constraints_of(context, body)
    starts = [start for prompt in prompts for start in _starts(context, body, prompt, constraints)]
    echoes = [_echo(context, body, asked, prompt) for asked, prompt in zip(body.prompt, prompts, strict=True)]
    generations = context.start(starts)
    head = {
        "id": new_id("cmpl", body.request_id),
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
    }
    engine = context.engine
    writers = [
        ChoiceWriter(
            index, body, prompts[index // body.n], echoes[index // body.n], engine.model, engine.tokenizer.token_bytes
        )
        for index in range(len(generations))
    ]
    return _Job(body, head, generations, writers)


async def _prompts(context: ServerContext, body: CompletionRequest) -> list[list[int]]:
    """Token ids of each prompt, cut as the request wants it."""
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    longest = context.engine.model.max_model_len
    prompts = []
    for index, prompt in enumerate(body.prompt):
        if index % PROMPTS_AT_ONCE == PROMPTS_AT_ONCE - 1:
            await asyncio.sleep(0)
        if isinstance(prompt, str):
            prompt = await context.tokenize(prompt, body.add_special_tokens, "prompt")
        prompts.append(truncated(body, prompt, longest, max_tokens))
    return prompts


def _starts(
    context: ServerContext, body: CompletionRequest, prompt: list[int], constraints: Constraints
) -> list[tuple[list[int], SamplingParams]]:
    """The sequences of one prompt."""
    max_tokens = body.max_tokens
    if max_tokens is None:
        room = fitting_max_tokens(len(prompt), context.engine.model.max_model_len, "prompt")
        max_tokens = min(DEFAULT_MAX_TOKENS, room)
    echo_logprobs = body.logprobs if body.echo else None

    def params(choice: int) -> SamplingParams:
        return sampling_params(
            body,
            context.defaults,
            max_tokens,
            body.logprobs,
            choice,
            constraints=constraints,
            echo_logprobs=echo_logprobs,
        )

    return [(prompt, params(choice)) for choice in range(body.n)]


def _echo(context: ServerContext, body: CompletionRequest, asked: str | list[int], prompt: list[int]) -> str:
    """The text of a prompt, if it is part of the answer: as it was sent, unless some of it was cut off."""
    if not body.echo:
        return ""
    if isinstance(asked, str) and body.truncate_prompt_tokens is None:
        return asked
    return context.engine.tokenizer.decode(prompt, body.skip_special_tokens)


async def _complete(context: ServerContext, body: CompletionRequest) -> Response:
    job = await _start(context, body)
    totals = await collect(job.generations)
    usage = UsageCounter(len(totals), body.n)
    choices = []
    for index, total in enumerate(totals):
        usage.update(index, total)
        choices.append(await job.part(index, total))
    return json_response({**job.head, "choices": choices, "usage": usage.as_json()})


async def _events(job: _Job) -> AsyncGenerator[bytes]:
    body = job.request
    usage = UsageCounter(len(job.generations), body.n)
    async with contextlib.aclosing(interleave(job.generations)) as deltas:
        async for index, delta in deltas:
            usage.update(index, delta)
            choice = await job.part(index, delta)
            if choice is None:
                continue
            chunk = {**job.head, "choices": [choice]}
            if body.include_usage:
                chunk["usage"] = usage.as_json() if body.continuous_usage else None
            yield event(chunk)
    if body.include_usage:
        yield event({**job.head, "choices": [], "usage": usage.as_json()})

"""POST /v1/completions."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response

from amoe.engine.async_engine import Generation
from amoe.engine.generation import GenerationDelta
from amoe.errors import RequestError
from amoe.policy.admission import fitting_max_tokens
from amoe.server import fields
from amoe.server.completion_schemas import CompletionRequest
from amoe.server.constraints import constraints_of
from amoe.server.context import ServerContext, new_id
from amoe.server.encoding import event, json_response
from amoe.server.logprobs import CompletionLogprobs
from amoe.server.sampling import check_spans, sampling_params
from amoe.server.streaming import EventStream, UsageCounter, collect, interleave, unless_disconnected

DEFAULT_MAX_TOKENS = 16  # OpenAI's


@dataclass(slots=True)
class _Job:
    """A request that the engine has admitted. Choice i belongs to prompt i // n."""

    request: CompletionRequest
    head: dict[str, Any]
    prompts: list[list[int]]
    echoes: list[str]
    generations: list[Generation]
    formatters: list[CompletionLogprobs | None]

    def choice(self, index: int, delta: GenerationDelta, *, is_first: bool = True) -> dict[str, Any]:
        """`choices[index]`, whole or in part. The prompt, if it is echoed, comes with the first part."""
        has_echo = is_first and self.request.echo
        return {
            "index": index,
            "text": (self.echoes[index // self.request.n] if has_echo else "") + delta.text,
            "logprobs": self._logprobs(index, delta, has_echo=has_echo),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }

    async def choice_aside(self, index: int, delta: GenerationDelta, *, is_first: bool = True) -> dict[str, Any]:
        """`choice`; in a thread where it names the tokens of a whole prompt, which takes 10 µs each."""
        if is_first and delta.prompt_logprobs:
            return await asyncio.to_thread(self.choice, index, delta, is_first=is_first)
        return self.choice(index, delta, is_first=is_first)

    def _logprobs(self, index: int, delta: GenerationDelta, *, has_echo: bool) -> dict[str, Any] | None:
        formatter = self.formatters[index]
        if formatter is None:
            return None
        if not has_echo:
            return formatter.format(delta.token_ids, delta.logprobs)
        prompt = self.prompts[index // self.request.n]
        return formatter.format([*prompt, *delta.token_ids], [None, *delta.prompt_logprobs, *delta.logprobs])


def completions_router(context: ServerContext) -> APIRouter:
    """The route, over `context`."""
    router = APIRouter()

    @router.post("/v1/completions")
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue one prompt or several."""
        fields.refuse_unsupported(body.model_extra or {}, fields.COMPLETIONS)
        fields.refuse_best_of(body.model_extra or {}, body.n)
        if body.echo and body.logprobs is not None and body.n > 1:
            raise RequestError("echo with logprobs would score the prompt for every choice: ask with n = 1", param="n")
        if body.stream:
            job = await _start(context, body)
            return EventStream(_events(job), job.generations)
        return await unless_disconnected(request, _complete(context, body))

    return router


async def _start(context: ServerContext, body: CompletionRequest) -> _Job:
    model = context.resolve_model(body.model)
    engine, tokenizer = context.engine, context.engine.tokenizer
    prompts = [
        await context.tokenize(prompt, body.add_special_tokens, "prompt") if isinstance(prompt, str) else prompt
        for prompt in body.prompt
    ]
    check_spans(body, [len(prompt) for prompt in prompts])
    constraints = await constraints_of(context, body)
    echo_logprobs = body.logprobs if body.echo else None
    starts = []
    for prompt in prompts:
        max_tokens = body.max_tokens
        if max_tokens is None:
            room = fitting_max_tokens(len(prompt), engine.model.max_model_len, "prompt")
            max_tokens = min(DEFAULT_MAX_TOKENS, room)
        for choice in range(body.n):
            params = sampling_params(
                body,
                context.defaults,
                max_tokens,
                body.logprobs,
                choice,
                constraints=constraints,
                echo_logprobs=echo_logprobs,
            )
            starts.append((prompt, params))
    generations = context.start(starts)
    echoes = []
    if body.echo:
        echoes = [p if isinstance(p, str) else tokenizer.decode(p, body.skip_special_tokens) for p in body.prompt]
    head = {
        "id": new_id("cmpl", body.request_id),
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
    }
    formatters = [
        None if body.logprobs is None else CompletionLogprobs(body.logprobs, tokenizer.token_bytes) for _ in generations
    ]
    return _Job(body, head, prompts, echoes, generations, formatters)


async def _complete(context: ServerContext, body: CompletionRequest) -> Response:
    job = await _start(context, body)
    totals = await collect(job.generations)
    usage = UsageCounter(len(totals), body.n)
    choices = []
    for index, total in enumerate(totals):
        usage.update(index, total)
        choices.append(await job.choice_aside(index, total))
    return json_response({**job.head, "choices": choices, "usage": usage.as_json()})


async def _events(job: _Job) -> AsyncGenerator[bytes]:
    body = job.request
    usage = UsageCounter(len(job.generations), body.n)
    begun: set[int] = set()
    async with contextlib.aclosing(interleave(job.generations)) as deltas:
        async for index, delta in deltas:
            usage.update(index, delta)
            choice = await job.choice_aside(index, delta, is_first=index not in begun)
            begun.add(index)
            if not (choice["text"] or delta.finish_reason or choice["logprobs"]):
                continue  # half a character, or what may become a stop string
            chunk = {**job.head, "choices": [choice]}
            if body.include_usage:
                chunk["usage"] = usage.as_json() if body.continuous_usage else None
            yield event(chunk)
    if body.include_usage:
        yield event({**job.head, "choices": [], "usage": usage.as_json()})

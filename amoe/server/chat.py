"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response

from amoe.server import fields
from amoe.server.chat_choices import ChoiceStream, prompt_extras, whole_choice
from amoe.server.chat_schemas import ChatCompletionRequest
from amoe.server.context import ServerContext, new_id
from amoe.server.conversation import ChatChoice, ChatDelta, ChatJob, start_chat
from amoe.server.encoding import event, json_response
from amoe.server.logprobs import FEW_LOGPROBS
from amoe.server.streaming import EventStream, UsageCounter, unless_disconnected


def chat_router(context: ServerContext) -> APIRouter:
    """The route, over `context`."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation."""
        fields.refuse_unsupported(body.model_extra or {}, fields.CHAT)
        fields.refuse_best_of(body.model_extra or {}, body.n)
        if body.stream:
            job = await start_chat(context, body)
            return EventStream(_events(job), job.generations)
        return await unless_disconnected(request, _complete(context, body))

    return router


class _Usage:
    """`usage` of a chat completion."""

    def __init__(self, job: ChatJob) -> None:
        self._counter = UsageCounter(len(job.generations), job.request.n)
        self._reasoning: dict[int, int] | None = None if job.answers.reasoning is None else {}

    def update(self, part: ChatChoice | ChatDelta) -> None:
        """Take the counts of a choice so far."""
        self._counter.update(part.index, part.raw)
        if self._reasoning is not None:
            self._reasoning[part.index] = part.reasoning_tokens

    def as_json(self) -> dict[str, Any]:
        usage = self._counter.as_json()
        if self._reasoning is not None:
            usage["completion_tokens_details"] = {"reasoning_tokens": sum(self._reasoning.values())}
        return usage


def _head(job: ChatJob, kind: str) -> dict[str, Any]:
    """What every part of the response says."""
    return {
        "id": new_id("chatcmpl", job.request.request_id),
        "object": kind,
        "created": job.created,
        "model": job.model,
        "service_tier": None,
        "system_fingerprint": None,
    }


async def _of_prompt(job: ChatJob, part: ChatChoice | ChatDelta) -> dict[str, Any]:
    """What is told of the prompt; in a thread where it names all of its tokens, which takes 10 µs each."""
    if job.request.prompt_logprobs is not None:
        return await asyncio.to_thread(prompt_extras, job, part.raw)
    return prompt_extras(job, part.raw)


async def _whole(job: ChatJob, choice: ChatChoice) -> dict[str, Any]:
    """A choice; made in a thread where many tokens are told with their best rivals, which takes up to 0.1 ms each."""
    if job.request.logprobs and len(choice.raw.token_ids) > FEW_LOGPROBS:
        return await asyncio.to_thread(whole_choice, job, choice)
    return whole_choice(job, choice)


async def _complete(context: ServerContext, body: ChatCompletionRequest) -> Response:
    job = await start_chat(context, body)
    choices = await job.collect()
    usage = _Usage(job)
    for choice in choices:
        usage.update(choice)
    return json_response(
        {
            **_head(job, "chat.completion"),
            "choices": [await _whole(job, choice) for choice in choices],
            "usage": usage.as_json(),
            **await _of_prompt(job, choices[0]),
        }
    )


async def _events(job: ChatJob) -> AsyncGenerator[bytes]:
    body = job.request
    head = _head(job, "chat.completion.chunk")
    usage = _Usage(job)
    streams = [ChoiceStream(job) for _ in job.generations]
    owes_prompt = True
    async with contextlib.aclosing(job.deltas()) as deltas:
        async for delta in deltas:
            usage.update(delta)
            for part in streams[delta.index].parts(delta):
                chunk: dict[str, Any] = {**head, "choices": [part]}
                if body.include_usage:
                    chunk["usage"] = usage.as_json() if body.continuous_usage else None
                if owes_prompt and delta.index == 0:
                    chunk |= await _of_prompt(job, delta)
                    owes_prompt = False
                yield event(chunk)
    if body.include_usage:
        yield event({**head, "choices": [], "usage": usage.as_json()})

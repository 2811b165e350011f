"""POST /v1/chat/completions."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response

from amoe.engine.generation import GenerationDelta
from amoe.server import fields
from amoe.server.chat_schemas import ChatCompletionRequest
from amoe.server.context import ServerContext, new_id
from amoe.server.conversation import ChatDelta, ChatJob, start_chat
from amoe.server.encoding import event, json_response
from amoe.server.logprobs import chat_logprobs
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


def _head(job: ChatJob, kind: str) -> dict[str, Any]:
    """What every part of the response says."""
    return {
        "id": new_id("chatcmpl", job.request.request_id),
        "object": kind,
        "created": job.created,
        "model": job.model,
    }


def _logprobs(job: ChatJob, delta: GenerationDelta) -> dict[str, Any] | None:
    """`choices[].logprobs` of a delta, if asked for."""
    if not job.request.logprobs:
        return None
    return chat_logprobs(delta.token_ids, delta.logprobs, job.request.top_logprobs or 0, job.tokenizer.token_bytes)


async def _complete(context: ServerContext, body: ChatCompletionRequest) -> Response:
    job = await start_chat(context, body)
    choices = await job.collect()
    usage = UsageCounter(len(choices), body.n)
    content = []
    for choice in choices:
        usage.update(choice.index, choice.raw)
        content.append(
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.content, "refusal": None},
                "logprobs": _logprobs(job, choice.raw),
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.raw.stop_reason,
            }
        )
    return json_response({**_head(job, "chat.completion"), "choices": content, "usage": usage.as_json()})


async def _events(job: ChatJob) -> AsyncGenerator[bytes]:
    body = job.request
    head = _head(job, "chat.completion.chunk")
    usage = UsageCounter(len(job.generations), body.n)

    def chunk(index: int, delta: dict[str, Any], **rest: Any) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **rest}
        content: dict[str, Any] = {**head, "choices": [choice]}
        if body.include_usage:
            content["usage"] = usage.as_json() if body.continuous_usage else None
        return event(content)

    introduced: set[int] = set()
    async with contextlib.aclosing(job.deltas()) as deltas:
        async for delta in deltas:
            usage.update(delta.index, delta.raw)
            if delta.index not in introduced:
                introduced.add(delta.index)
                yield chunk(delta.index, {"role": "assistant", "content": ""})
            for part in _parts(job, delta, chunk):
                yield part
    if body.include_usage:
        yield event({**head, "choices": [], "usage": usage.as_json()})


def _parts(job: ChatJob, delta: ChatDelta, chunk: Any) -> list[bytes]:
    """The events that say what is new in one choice."""
    parts = []
    if delta.content or (job.request.logprobs and delta.raw.token_ids):
        parts.append(chunk(delta.index, {"content": delta.content}, logprobs=_logprobs(job, delta.raw)))
    if delta.finish_reason is not None:
        parts.append(chunk(delta.index, {}, finish_reason=delta.finish_reason, stop_reason=delta.raw.stop_reason))
    return parts

"""POST /v1/chat/completions."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response

from amoe.engine.async_engine import Generation
from amoe.engine.generation import GenerationDelta
from amoe.engine.tokenizer import Tokenizer
from amoe.errors import RequestError
from amoe.policy.admission import fitting_max_tokens
from amoe.server import fields
from amoe.server.context import ServerContext, new_id
from amoe.server.encoding import event, json_response
from amoe.server.logprobs import chat_logprobs
from amoe.server.sampling import check_spans, sampling_params
from amoe.server.schemas import ChatCompletionRequest, ChatMessage
from amoe.server.streaming import EventStream, UsageCounter, collect, interleave, unless_disconnected


@dataclass(slots=True)
class _Job:
    """A request that the engine has admitted."""

    request: ChatCompletionRequest
    head: dict[str, Any]
    generations: list[Generation]
    tokenizer: Tokenizer

    def logprobs(self, delta: GenerationDelta) -> dict[str, Any] | None:
        """`choices[].logprobs` of a delta, if asked for."""
        if not self.request.logprobs:
            return None
        top = self.request.top_logprobs or 0
        return chat_logprobs(delta.token_ids, delta.logprobs, top, self.tokenizer.token_bytes)


def chat_router(context: ServerContext) -> APIRouter:
    """The route, over `context`."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation."""
        fields.refuse_unsupported(body.model_extra or {}, fields.CHAT)
        fields.refuse_best_of(body.model_extra or {}, body.n)
        if body.stream:
            job = await _start(context, body)
            return EventStream(_events(job), job.generations)
        return await unless_disconnected(request, _complete(context, body))

    return router


def _text_of(content: Any, where: str) -> str:
    """Text of a message's content, which is a string or a list of text parts."""
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a string or a list of parts", param=where)
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RequestError(
                f"{where}.{index}: only parts of type 'text' are supported, not {kind!r}", param=f"{where}.{index}"
            )
        texts.append(part["text"])
    return "\n".join(texts)


def template_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as chat templates expect them: content is text.

    Raises:
        RequestError: naming what is not supported yet (tool calls, images).
    """
    result = []
    for index, message in enumerate(messages):
        where = f"messages.{index}"
        extra = message.model_extra or {}
        for name in ("tool_calls", "function_call", "audio"):
            if extra.get(name):
                raise RequestError(f"{where}.{name} is not supported by this server", param=f"{where}.{name}")
        if message.role in ("tool", "function"):
            raise RequestError(f"{where}: the role {message.role!r} is not supported: there are no tools", where)
        if message.content is None and message.role != "assistant":
            raise RequestError(f"{where}.content is missing", param=f"{where}.content")
        text = _text_of(message.content, f"{where}.content")
        result.append({**extra, "role": message.role, "content": text})
    return result


async def _start(context: ServerContext, body: ChatCompletionRequest) -> _Job:
    model = context.resolve_model(body.model)
    engine = context.engine
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
    starts = [
        (prompt, sampling_params(body, context.defaults, max_tokens, logprobs, choice)) for choice in range(body.n)
    ]
    generations = engine.start(starts, param="messages")
    head = {
        "id": new_id("chatcmpl", body.request_id),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
    }
    return _Job(body, head, generations, engine.tokenizer)


async def _complete(context: ServerContext, body: ChatCompletionRequest) -> Response:
    job = await _start(context, body)
    totals = await collect(job.generations)
    usage = UsageCounter(len(totals), body.n)
    choices = []
    for index, total in enumerate(totals):
        usage.update(index, total)
        choices.append(
            {
                "index": index,
                "message": {"role": "assistant", "content": total.text, "refusal": None},
                "logprobs": job.logprobs(total),
                "finish_reason": total.finish_reason,
                "stop_reason": total.stop_reason,
            }
        )
    return json_response({**job.head, "choices": choices, "usage": usage.as_json()})


async def _events(job: _Job) -> AsyncGenerator[bytes]:
    body = job.request
    head = {**job.head, "object": "chat.completion.chunk"}
    usage = UsageCounter(len(job.generations), body.n)

    def chunk(index: int, delta: dict[str, Any], **rest: Any) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **rest}
        content: dict[str, Any] = {**head, "choices": [choice]}
        if body.include_usage:
            content["usage"] = usage.as_json() if body.continuous_usage else None
        return event(content)

    introduced: set[int] = set()
    async with contextlib.aclosing(interleave(job.generations)) as deltas:
        async for index, delta in deltas:
            usage.update(index, delta)
            if index not in introduced:
                introduced.add(index)
                yield chunk(index, {"role": "assistant", "content": ""})
            if delta.text or (body.logprobs and delta.token_ids):
                yield chunk(index, {"content": delta.text}, logprobs=job.logprobs(delta))
            if delta.finish_reason is not None:
                yield chunk(index, {}, finish_reason=delta.finish_reason, stop_reason=delta.stop_reason)
    if body.include_usage:
        yield event({**head, "choices": [], "usage": usage.as_json()})

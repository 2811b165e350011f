"""/v1/messages and /v1/messages/count_tokens: Anthropic's Messages API."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response

from amoe.server.context import ServerContext
from amoe.server.conversation import ChatJob, close_all, start_chat
from amoe.server.encoding import json_response, named_event
from amoe.server.messages.assembler import Event, MessageAssembler
from amoe.server.messages.errors import describe_in_stream
from amoe.server.messages.schemas import MessagesPrompt, MessagesRequest
from amoe.server.messages.translate import translate
from amoe.server.rendering import chat_prompt_ids
from amoe.server.streaming import EventStream, UsageCounter, unless_disconnected


class _Run:
    """Works on one message, once."""

    def __init__(self, job: ChatJob, body: MessagesRequest) -> None:
        message_id = f"msg_{body.request_id or uuid.uuid4().hex}"
        self.job = job
        self.assembler = MessageAssembler(message_id, job.model, len(job.prompt_token_ids), body.stop_sequences)

    async def events(self) -> AsyncGenerator[Event]:
        """All events, in order. Leaving the iteration frees the sequence.

        Raises:
            AmoeError: what broke it off.
        """
        usage = UsageCounter(1, 1)
        finish_reason: str | None = None
        stop: str | int | None = None
        thoughts = 0
        try:
            for event in self.assembler.begin():
                yield event
            async with contextlib.aclosing(self.job.deltas()) as deltas:
                async for delta in deltas:
                    usage.update(delta.index, delta.raw)
                    finish_reason = delta.finish_reason or finish_reason
                    stop = delta.raw.stop_reason
                    thoughts = delta.reasoning_tokens
                    for event in self.assembler.push(delta):
                        yield event
            for event in self.assembler.finish(finish_reason, stop, usage.as_json(), thoughts):
                yield event
        finally:
            close_all(self.job.generations)

    async def frames(self) -> AsyncGenerator[bytes]:
        """The events as they are sent; an error is one more of them."""
        try:
            async with contextlib.aclosing(self.events()) as events:
                async for event in events:
                    yield named_event(event["type"], event)
        except Exception as error:
            yield named_event("error", describe_in_stream(error))

    async def complete(self) -> dict[str, Any]:
        """The whole message."""
        async with contextlib.aclosing(self.events()) as events:
            async for _ in events:
                pass
        return self.assembler.message


async def _start(context: ServerContext, body: MessagesRequest) -> _Run:
    chat, names = translate(body)
    with names.told():
        return _Run(await start_chat(context, chat), body)


async def _complete(context: ServerContext, body: MessagesRequest) -> Response:
    run = await _start(context, body)
    return json_response(await run.complete())


def messages_router(context: ServerContext) -> APIRouter:
    """The routes, over `context`. Their errors have Anthropic's shape within `AnthropicErrors` only."""
    router = APIRouter()

    @router.post("/v1/messages")
    async def create_message(body: MessagesRequest, request: Request) -> Response:
        """Answer a conversation, as Anthropic's API does."""
        if body.stream:
            run = await _start(context, body)
            return EventStream(run.frames(), run.job.generations, end=b"")
        return await unless_disconnected(request, _complete(context, body))

    @router.post("/v1/messages/count_tokens")
    async def count_tokens(body: MessagesPrompt) -> Response:
        """Tokens that the prompt of these messages has."""
        context.resolve_model(body.model)
        chat, names = translate(body)
        with names.told():
            return json_response({"input_tokens": len(await chat_prompt_ids(context, chat))})

    return router

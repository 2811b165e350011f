"""/v1/responses: OpenAI's Responses API."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response

from amoe.engine.generation import GenerationDelta
from amoe.errors import RequestError
from amoe.server.context import ServerContext
from amoe.server.conversation import ChatJob, start_chat
from amoe.server.encoding import json_response, named_event
from amoe.server.logprobs import chat_logprobs
from amoe.server.responses.assembler import FormatLogprobs, ResponseAssembler
from amoe.server.responses.background import BackgroundRun
from amoe.server.responses.render import response_head
from amoe.server.responses.run import ResponseRun
from amoe.server.responses.schemas import ResponsesRequest
from amoe.server.responses.store import ResponseStore, StoredResponse
from amoe.server.responses.translate import as_stored, input_items, translate
from amoe.server.streaming import EventStream, unless_disconnected

Limit = Annotated[int, Query(ge=1, le=100)]


class ResponsesService:
    """Makes responses, and keeps those that are to be kept."""

    def __init__(self, context: ServerContext, store: ResponseStore) -> None:
        self.store = store
        self._context = context

    async def create(self, body: ResponsesRequest, request: Request) -> Response:
        """Answer, in one of the four ways: at once or in the background, whole or as a stream.

        Raises:
            RequestError: naming the field.
            EngineOverloadedError, EngineDeadError: no room.
        """
        if not body.stream and not body.background:
            return await unless_disconnected(request, self._complete(body))
        stored, run = await self._start(body)
        if not body.background:
            return EventStream(self._frames(stored, run, keep=body.store), run.job.generations)
        tasks = self._context.background
        work = BackgroundRun(run, tasks, keeps_events=body.stream, on_end=lambda: self._ended(stored))
        stored.run = work
        self.store.put(stored)
        return EventStream(work.follow(), ()) if body.stream else json_response(stored.body)

    async def _complete(self, body: ResponsesRequest) -> Response:
        stored, run = await self._start(body)
        response = await run.complete()
        if body.store:
            self.store.put(stored)
        return json_response(response)

    async def _frames(self, stored: StoredResponse, run: ResponseRun, *, keep: bool) -> AsyncGenerator[bytes]:
        async with aclosing(run.events()) as events:
            async for event in events:
                if keep and stored.assembler.is_over and stored.id not in self.store:
                    self.store.put(stored)  # before the client is told the end: it may come back at once
                yield named_event(event["type"], event)

    def _ended(self, stored: StoredResponse) -> None:
        if stored.id in self.store:  # not deleted meanwhile
            self.store.put(stored)

    async def _start(self, body: ResponsesRequest) -> tuple[StoredResponse, ResponseRun]:
        """Admit the conversation that `body` continues or begins."""
        history = self._history(body.previous_response_id)
        items = input_items(body, self.store.find_item)
        chat, names = translate(body, history, items)
        response_id = f"resp_{body.request_id or uuid.uuid4().hex}"
        if response_id in self.store:
            raise RequestError(f"request_id: there is a response {response_id!r} already", param="request_id")
        with names.told():
            job = await start_chat(self._context, chat)
        head = response_head(body, response_id, job.model, job.created, self._context.defaults)
        formatter = _logprobs_formatter(job) if body.wants_logprobs else None
        assembler = ResponseAssembler(head, formatter, with_summary=body.reasoning.summary is not None)
        given_ids = frozenset(item["id"] for item in items if isinstance(item.get("id"), str))
        stored = StoredResponse(assembler, history, as_stored(items), given_ids=given_ids)
        return stored, ResponseRun(job, assembler)

    def _history(self, response_id: str | None) -> list[dict[str, Any]]:
        if response_id is None:
            return []
        previous = self.store.get(response_id, "previous_response_id")
        if not previous.assembler.is_over:
            raise RequestError(f"the response {response_id!r} has not ended yet", param="previous_response_id")
        return previous.conversation


def _logprobs_formatter(job: ChatJob) -> FormatLogprobs:
    num_top = job.request.top_logprobs or 0

    def format_logprobs(delta: GenerationDelta) -> list[dict[str, Any]]:
        return chat_logprobs(delta.token_ids, delta.logprobs, num_top, job.tokenizer.token_bytes)["content"]

    return format_logprobs


def responses_router(context: ServerContext, store: ResponseStore | None = None) -> APIRouter:
    """The routes, over `context`. Responses are kept in `store`, by default one of their own."""
    router = APIRouter()
    service = ResponsesService(context, store or ResponseStore())

    @router.post("/v1/responses")
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        """Answer a conversation, and keep the answer for later."""
        return await service.create(body, request)

    @router.get("/v1/responses/{response_id}")
    async def get_response(response_id: str, stream: bool = False, starting_after: int = -1) -> Response:
        """A response that was stored, finished or not."""
        stored = service.store.get(response_id)
        if not stream:
            return json_response(stored.body)
        if stored.run is None or not stored.run.keeps_events:
            raise RequestError("stream: only what was begun with background and stream can be streamed", param="stream")
        return EventStream(stored.run.follow(starting_after), ())

    @router.post("/v1/responses/{response_id}/cancel")
    async def cancel_response(response_id: str) -> Response:
        """Stop a response that is made in the background; one that has ended stays as it is."""
        stored = service.store.get(response_id)
        if stored.run is None:
            raise RequestError(f"the response {response_id!r} was not made in the background: nothing to cancel")
        await stored.run.cancel()
        return json_response(stored.body)

    @router.delete("/v1/responses/{response_id}")
    async def delete_response(response_id: str) -> Response:
        """Forget a response, and stop it if it is still being made."""
        stored = service.store.get(response_id)
        if stored.run is not None:
            await stored.run.cancel()
        if response_id in service.store:
            service.store.delete(response_id)
        return json_response({"id": response_id, "object": "response", "deleted": True})

    @router.get("/v1/responses/{response_id}/input_items")
    async def list_input_items(
        response_id: str, limit: Limit = 20, order: Literal["asc", "desc"] = "desc", after: str | None = None
    ) -> Response:
        """What a response answers, the latest first unless asked otherwise."""
        stored = service.store.get(response_id)
        items = [*stored.history, *stored.items]
        return json_response(_page(items if order == "asc" else items[::-1], limit, after))

    return router


def _page(items: list[dict[str, Any]], limit: int, after: str | None) -> dict[str, Any]:
    """`limit` of `items`, from the one behind `after` on.

    Raises:
        RequestError: naming `after`, if none of the items has that id.
    """
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        raise RequestError(f"after: there is no item {after!r} among the input of this response", param="after")
    start = 0 if after is None else ids.index(after) + 1
    page = items[start : start + limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": start + limit < len(items),
    }

"""The HTTP application: routes over an `AsyncEngine`."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from amoe import __version__, metrics
from amoe.server.chat import chat_router
from amoe.server.completions import completions_router
from amoe.server.context import ServerContext
from amoe.server.encoding import json_response
from amoe.server.errors import error_body, install_error_handlers
from amoe.server.responses import responses_router

MAX_BODY_BYTES = 16 * 1024 * 1024


class BodyLimit:
    """ASGI middleware: refuses a body of more than `limit` bytes, without reading it where its length is told."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit
        self._message = f"the body is larger than {limit} bytes"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._limit:
            await json_response(error_body(self._message, 413), 413)(scope, receive, send)
            return
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                raise HTTPException(413, self._message)
            return message

        await self._app(scope, limited, send)


def create_app(context: ServerContext, max_body_bytes: int = MAX_BODY_BYTES) -> FastAPI:
    """The application. It neither starts nor stops the engine."""
    app = FastAPI(title="amoe", version=__version__, description="OpenAI-compatible API of an amoe server.")
    app.add_middleware(BodyLimit, limit=max_body_bytes)
    install_error_handlers(app)
    app.include_router(completions_router(context))
    app.include_router(chat_router(context))
    app.include_router(responses_router(context))
    _add_model_routes(app, context)
    _add_operations_routes(app, context)
    return app


def _add_model_routes(app: FastAPI, context: ServerContext) -> None:
    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": context.created,
            "owned_by": "amoe",
            "root": context.model_names[0],
            "parent": None,
            "max_model_len": context.engine.model.max_model_len,
        }

    @app.get("/v1/models")
    async def list_models() -> Response:
        """The served names."""
        return json_response({"object": "list", "data": [card(name) for name in context.model_names]})

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Response:
        """One served name."""
        return json_response(card(context.resolve_model(name)))


def _add_operations_routes(app: FastAPI, context: ServerContext) -> None:
    @app.get("/health")
    @app.get("/ping")
    @app.post("/ping")
    async def health() -> Response:
        """200 while every worker makes progress, else 503; no body."""
        return Response(status_code=200 if context.engine.healthy else 503)

    @app.get("/version")
    async def version() -> Response:
        """The version of amoe."""
        return json_response({"version": __version__})

    @app.get("/metrics")
    async def expose_metrics() -> Response:
        """Prometheus text."""
        return Response(context.engine.metrics.render(), headers={"Content-Type": metrics.CONTENT_TYPE})

"""The HTTP application: routes over an `AsyncEngine`, and what requests pass on their way to them."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, FastAPI
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware

from amoe import __version__
from amoe.server.access_log import AccessLog, RequestLog
from amoe.server.admin import admin_router
from amoe.server.chat import chat_router
from amoe.server.completions import completions_router
from amoe.server.context import ServerContext
from amoe.server.errors import install_error_handlers
from amoe.server.messages import AnthropicErrors, messages_router
from amoe.server.middleware.auth import AdminKeyGuard, ApiKeyGuard
from amoe.server.middleware.body import BodyLimit
from amoe.server.middleware.request_scope import Observer, RequestScope
from amoe.server.models import models_router
from amoe.server.operations import LoadCounter, operations_router
from amoe.server.options import HttpOptions
from amoe.server.page.routes import page_router
from amoe.server.request_metrics import RequestMetrics
from amoe.server.responses import responses_router
from amoe.server.tokenize import tokenize_router


def create_app(
    context: ServerContext, options: HttpOptions | None = None, observers: Sequence[Observer] = ()
) -> FastAPI:
    """The application. It neither starts nor stops the engine.

    Args:
        observers: told of every request, beside those that `options` ask for.
    """
    options = options or HttpOptions()
    load = LoadCounter()
    # /docs without a CDN: there may be no internet, and whose script is in it has the browser's login.
    app = FastAPIOffline(
        redoc_url=None,
        static_url="/docs/static",
        title="amoe",
        version=__version__,
        description="OpenAI-compatible API of an amoe server.",
    )
    install_error_handlers(app)
    for router in _routers(context, load):
        app.include_router(router)
    counters: list[Observer] = [load, RequestMetrics(context.engine.metrics.http)]
    _add_middleware(app, context, options, [*counters, *_logs(context, options), *observers])
    return app


def _routers(context: ServerContext, load: LoadCounter) -> list[APIRouter]:
    return [
        completions_router(context),
        chat_router(context),
        responses_router(context),
        messages_router(context),
        tokenize_router(context),
        models_router(context),
        operations_router(context, load),
        admin_router(context),
        page_router(context),
    ]


def _logs(context: ServerContext, options: HttpOptions) -> list[Observer]:
    logs: list[Observer] = []
    if options.access_log:
        logs.append(AccessLog())
    if options.log_requests:
        logs.append(RequestLog(context.engine.tokenizer, options.max_log_len))
    return logs


def _add_middleware(app: FastAPI, context: ServerContext, options: HttpOptions, observers: list[Observer]) -> None:
    """What is added later is further outside."""
    app.add_middleware(
        BodyLimit, limit=options.body_limit(context.engine.model.max_model_len), timeout_s=options.body_timeout_s
    )
    app.add_middleware(AdminKeyGuard, digests=options.admin_digests)
    if options.key_digests:
        app.add_middleware(ApiKeyGuard, digests=options.key_digests)
    cors = options.cors
    if cors.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors.origins,
            allow_methods=cors.methods,
            allow_headers=cors.headers,
            allow_credentials=cors.credentials,
            expose_headers=("x-request-id", "retry-after", "retry-after-ms"),
        )
    app.add_middleware(RequestScope, observers=observers, is_draining=lambda: context.engine.is_draining)
    app.add_middleware(AnthropicErrors)

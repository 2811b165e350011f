"""From an engine to an HTTP server that serves it, until somebody says stop, or it dies."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator, Callable

from amoe.cluster.admin import AdminDesk
from amoe.cluster.opening import told_metrics
from amoe.engine.async_engine import AsyncEngine
from amoe.server.app import create_app
from amoe.server.context import ServerContext
from amoe.server.grammar_check import GrammarProcess
from amoe.server.options import ServerOptions
from amoe.server.sampling import SamplingDefaults
from amoe.server.status_line import log_status
from amoe.server.tracing import Tracer
from amoe.server.web_server import WebServer

POLL_GRACE_S = 3.0  # for clients to ask once more for what was made in the background
DEATH_GRACE_S = 10.0  # a server that can serve nothing any more still says why to whoever asks, then makes room


async def serve_engine(
    engine: AsyncEngine,
    options: ServerOptions,
    defaults: SamplingDefaults,
    listener: socket.socket,
    requested: asyncio.Event,
    on_listening: Callable[[], None],
    *,
    admin: AdminDesk | None = None,
) -> int:
    """Serve until `requested` is set, and what is open has ended, or the engine dies. Closes the engine.

    Args:
        admin: shows and changes the workers; None: they stay as they are.

    Returns:
        The exit status.
    """
    tracer = None if options.otlp_traces_endpoint is None else Tracer(options.otlp_traces_endpoint)
    try:
        async with GrammarProcess() as check_grammar:
            context = ServerContext(
                engine=engine,
                model_names=options.model_names,
                defaults=defaults,
                check_grammar=check_grammar,
                chat=options.chat,
                admin=admin,
            )
            async with (
                _helpers(context, options, tracer),
                told_metrics(options.executor, engine.metrics.registry.collect),
            ):
                await _serve_http(context, options, tracer, listener, requested, on_listening)
        return 1 if engine.died.is_set() else 0
    finally:
        await engine.close()


@contextlib.asynccontextmanager
async def _helpers(context: ServerContext, options: ServerOptions, tracer: Tracer | None) -> AsyncIterator[None]:
    """What runs beside the server, and ends with it."""
    status = asyncio.create_task(log_status(context.engine)) if options.log_stats else None
    try:
        yield
    finally:
        if status is not None:
            status.cancel()
            await asyncio.gather(status, return_exceptions=True)
        if tracer is not None:
            await asyncio.to_thread(tracer.close)


async def _serve_http(
    context: ServerContext,
    options: ServerOptions,
    tracer: Tracer | None,
    listener: socket.socket,
    requested: asyncio.Event,
    on_listening: Callable[[], None],
) -> None:
    engine = context.engine
    server = WebServer(create_app(context, options.http, [] if tracer is None else [tracer]), options)
    engine.metrics.http.watch_connections(lambda: server.num_connections)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    stopping = asyncio.create_task(requested.wait())
    died = asyncio.create_task(engine.died.wait())
    try:
        await asyncio.wait((asyncio.create_task(server.listening.wait()), serving), return_when=asyncio.FIRST_COMPLETED)
        if server.listening.is_set():
            on_listening()
        await asyncio.wait((stopping, serving, died), return_when=asyncio.FIRST_COMPLETED)
        if died.done():
            say(f"leaving in {DEATH_GRACE_S:g} s, for a supervisor to start a new server")
            await asyncio.wait((stopping, serving), timeout=DEATH_GRACE_S, return_when=asyncio.FIRST_COMPLETED)
        if engine.num_open:
            say(
                f"shutting down: {engine.num_open} open request(s) may go on for {options.shutdown_timeout_s:g} s "
                "(interrupt again to kill)"
            )
        engine.refuse_new()
        deadline = asyncio.get_running_loop().time() + options.shutdown_timeout_s
        await _finish_background(context, serving, options.shutdown_timeout_s)
        server.should_exit = True
        await asyncio.wait((serving,), timeout=max(0.0, deadline - asyncio.get_running_loop().time()))
        if not serving.done():
            await engine.close()  # what is still open gets a proper error, and so comes to its end
        await serving
    finally:
        stopping.cancel()
        died.cancel()


async def _finish_background(context: ServerContext, serving: asyncio.Task[None], timeout_s: float) -> None:
    """Let work that no connection waits for come to its end, and its clients fetch what it made: they come back for it,
    as long as there is somebody who listens."""
    if context.background:
        ended = asyncio.gather(*context.background, return_exceptions=True)
        await asyncio.wait((ended, serving), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            await asyncio.wait((serving,), timeout=min(POLL_GRACE_S, timeout_s))


def say(text: str) -> None:
    """To whoever watches the terminal."""
    print(text, file=sys.stderr, flush=True)

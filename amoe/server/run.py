"""The life of `amoe serve`: check, load, serve, drain, stop. One process, one event loop, the workers its children."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shlex
import socket
import sys
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import setproctitle
import uvloop

from amoe.cluster.front import connect_engine
from amoe.cluster.local import LocalCluster
from amoe.cluster.shutdown import ShutdownSignals
from amoe.config import EngineConfig
from amoe.engine.tokenizer import Tokenizer
from amoe.errors import ConfigError
from amoe.logs import LogOptions, configure
from amoe.models.config import load_model_config
from amoe.server.app import create_app
from amoe.server.context import ServerContext
from amoe.server.grammar_check import GrammarProcess
from amoe.server.options import ServerOptions
from amoe.server.progress import LoadingProgress
from amoe.server.sampling import SamplingDefaults
from amoe.server.status_line import log_status
from amoe.server.tracing import Tracer
from amoe.server.web_server import WebServer, address_of, bound_socket, check_certificate

T = TypeVar("T")

WORKER_GRACE_S = 10.0
POLL_GRACE_S = 3.0  # for clients to ask once more for what was made in the background
DEATH_GRACE_S = 10.0  # a server that can serve nothing any more still says why to whoever asks, then makes room


class _Interrupted(Exception):
    """The user wants to leave before the server is ready."""


def run_server(config: EngineConfig, options: ServerOptions, logs: LogOptions | None = None) -> int:
    """Serve until a signal says stop. Returns the exit status.

    Raises:
        AmoeError: the server cannot start; the message is for the user.
    """
    setproctitle.setproctitle("amoe: server")  # which also hides the API keys of the command line
    logs = logs or LogOptions()
    configure(logs, "server")
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(config, options, logs))
    except _Interrupted:
        print("interrupted while loading", file=sys.stderr)
        return 130


async def _serve(config: EngineConfig, options: ServerOptions, logs: LogOptions) -> int:
    check_model_directory(config.model)
    check_certificate(options)
    model = load_model_config(config.model)  # first: what is wrong with the checkpoint is said before all else
    tokenizer = Tokenizer(config.model, options.chat.chat_template)
    defaults = SamplingDefaults.from_checkpoint(config.model)
    tracer = None if options.otlp_traces_endpoint is None else Tracer(options.otlp_traces_endpoint)
    with bound_socket(options) as listener:
        cluster = LocalCluster(config, logs=logs)
        signals = ShutdownSignals(cluster.kill)
        signals.install()
        try:
            with LoadingProgress(f"loading {config.model}") as progress:
                ready = await _unless_requested(signals, cluster.start(progress))
            engine = connect_engine(
                cluster,
                ready,
                name=options.model_names[0],
                tokenizer=tokenizer,
                heartbeat_timeout_s=options.heartbeat_timeout_s,
                stall_timeout_s=options.stall_timeout_s,
            )
            _warn_of_short_cache(engine.model.max_model_len, config.max_model_len, model.max_position_embeddings)
            try:
                async with GrammarProcess() as check_grammar:
                    context = ServerContext(
                        engine=engine,
                        model_names=options.model_names,
                        defaults=defaults,
                        check_grammar=check_grammar,
                        chat=options.chat,
                    )
                    async with _helpers(context, options, tracer):
                        await _serve_http(context, options, tracer, listener, signals)
                return 1 if engine.died.is_set() else 0
            finally:
                await engine.close()
        finally:
            await cluster.stop(WORKER_GRACE_S)


def _warn_of_short_cache(has: int, asked: int | None, trained: int) -> None:
    if has < (asked or trained):
        print(
            f"the KV cache holds {has} of the {trained} tokens that the model could take: raise "
            "--kv-cache-memory-bytes for longer sequences",
            file=sys.stderr,
        )


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
    signals: ShutdownSignals,
) -> None:
    engine = context.engine
    server = WebServer(create_app(context, options.http, [] if tracer is None else [tracer]), options)
    engine.metrics.http.watch_connections(lambda: server.num_connections)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    requested = asyncio.create_task(signals.requested.wait())
    died = asyncio.create_task(engine.died.wait())
    try:
        await asyncio.wait((asyncio.create_task(server.listening.wait()), serving), return_when=asyncio.FIRST_COMPLETED)
        if server.listening.is_set():
            _announce(context, options, listener)
        await asyncio.wait((requested, serving, died), return_when=asyncio.FIRST_COMPLETED)
        if died.done():
            _say(f"leaving in {DEATH_GRACE_S:g} s, for a supervisor to start a new server")
            await asyncio.wait((requested, serving), timeout=DEATH_GRACE_S, return_when=asyncio.FIRST_COMPLETED)
        if engine.num_open:
            _say(
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
        requested.cancel()
        died.cancel()


async def _finish_background(context: ServerContext, serving: asyncio.Task[None], timeout_s: float) -> None:
    """Let work that no connection waits for come to its end, and its clients fetch what it made: they come back for it,
    as long as there is somebody who listens."""
    if context.background:
        ended = asyncio.gather(*context.background, return_exceptions=True)
        await asyncio.wait((ended, serving), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            await asyncio.wait((serving,), timeout=min(POLL_GRACE_S, timeout_s))


async def _unless_requested(signals: ShutdownSignals, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when a signal comes."""
    task = asyncio.create_task(work)
    requested = asyncio.create_task(signals.requested.wait())
    try:
        await asyncio.wait((task, requested), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise _Interrupted
    finally:
        task.cancel()
        requested.cancel()
        await asyncio.gather(task, requested, return_exceptions=True)


def check_model_directory(model: str) -> None:
    """Fail early, and in the user's words.

    Raises:
        ConfigError: if `model` is no checkpoint directory.
    """
    path = Path(model)
    if not path.is_dir():
        raise ConfigError(f"MODEL {model!r} is not a directory: amoe serves local checkpoints and downloads nothing")
    if not (path / "config.json").is_file():
        raise ConfigError(f"MODEL {model!r} has no config.json: it is not a checkpoint in Hugging Face format")


def _say(text: str) -> None:
    """To whoever watches the terminal."""
    print(text, file=sys.stderr, flush=True)


def _announce(context: ServerContext, options: ServerOptions, listener: socket.socket) -> None:
    port = listener.getsockname()[1] if options.uds is None else 0
    url, curl = address_of(options, port)
    changed = context.defaults.changed()
    if changed:
        print(f"sampling defaults of this model's generation_config.json: {changed}")
    print(f"ready at {url}")
    key = " -H 'Authorization: Bearer '$AMOE_API_KEY" if options.http.key_digests else ""
    body = {"model": options.model_names[0], "prompt": "def add(a, b):", "max_tokens": 32}
    print(
        f"try: curl {curl}/v1/completions{key} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}",
        flush=True,
    )

"""The life of `amoe serve`: check, load, serve, drain, stop. One process, one event loop, the workers its children."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import setproctitle
import uvicorn
from fastapi import FastAPI

from amoe.cluster.front import connect_engine
from amoe.cluster.local import LocalCluster
from amoe.cluster.shutdown import ShutdownSignals
from amoe.config import EngineConfig
from amoe.engine.tokenizer import Tokenizer
from amoe.errors import ConfigError
from amoe.models.config import load_model_config
from amoe.server.app import create_app
from amoe.server.context import ServerContext
from amoe.server.progress import LoadingProgress
from amoe.server.sampling import SamplingDefaults

logger = logging.getLogger(__name__)

T = TypeVar("T")

WORKER_GRACE_S = 10.0
DEATH_GRACE_S = 10.0  # a server that can serve nothing any more still says why to whoever asks, then makes room
FLUSH_GRACE_S = 10.0  # for clients to read their last bytes, before uvicorn cuts them off
CONNECTION_BACKLOG = 2048


class _Interrupted(Exception):
    """The user wants to leave before the server is ready."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerOptions:
    """How the engine is served.

    Attributes:
        host, port: where to listen; port 0 takes a free one.
        model_names: served names, at least one.
        shutdown_timeout_s: how long open requests may go on after SIGTERM.
        uvicorn_log_level, access_log: of the web server.
    """

    host: str
    port: int
    model_names: tuple[str, ...]
    shutdown_timeout_s: float = 30.0
    uvicorn_log_level: str = "info"
    access_log: bool = True


class WebServer(uvicorn.Server):
    """uvicorn, told from outside when to leave, and telling when it listens."""

    def __init__(self, app: FastAPI, options: ServerOptions) -> None:
        config = uvicorn.Config(
            app,
            log_level=options.uvicorn_log_level,
            access_log=options.access_log,
            lifespan="off",
            timeout_graceful_shutdown=round(options.shutdown_timeout_s + FLUSH_GRACE_S),
            backlog=CONNECTION_BACKLOG,
        )
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone: `ShutdownSignals` has them."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets=sockets)
        self.listening.set()


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, so that a taken port is found before the model is loaded. It refuses connections until used.

    Raises:
        ConfigError: if the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"--host {host}: {error.strerror}") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}; choose another --port") from error
    return listener


def run_server(config: EngineConfig, options: ServerOptions) -> int:
    """Serve until a signal says stop. Returns the exit status.

    Raises:
        AmoeError: the server cannot start; the message is for the user.
    """
    setproctitle.setproctitle("amoe: server")
    try:
        return asyncio.run(_serve(config, options))
    except _Interrupted:
        print("interrupted while loading", file=sys.stderr)
        return 130


async def _serve(config: EngineConfig, options: ServerOptions) -> int:
    check_model_directory(config.model)
    model = load_model_config(config.model)  # first: what is wrong with the checkpoint is said before all else
    tokenizer = Tokenizer(config.model)
    defaults = SamplingDefaults.from_checkpoint(config.model)
    with contextlib.closing(bind(options.host, options.port)) as listener:
        cluster = LocalCluster(config)
        signals = ShutdownSignals(cluster.kill)
        signals.install()
        try:
            with LoadingProgress(f"loading {config.model}") as progress:
                ready = await _unless_requested(signals, cluster.start(progress))
            engine = connect_engine(cluster, ready, name=options.model_names[0], tokenizer=tokenizer)
            if engine.model.max_model_len < (config.max_model_len or model.max_position_embeddings):
                print(
                    f"the KV cache holds {engine.model.max_model_len} of the {model.max_position_embeddings} tokens "
                    "that the model could take: raise --kv-cache-memory-bytes for longer sequences",
                    file=sys.stderr,
                )
            try:
                context = ServerContext(engine=engine, model_names=options.model_names, defaults=defaults)
                await _serve_http(context, options, listener, signals)
                return 1 if engine.died.is_set() else 0
            finally:
                await engine.close()
        finally:
            await cluster.stop(WORKER_GRACE_S)


async def _serve_http(
    context: ServerContext, options: ServerOptions, listener: socket.socket, signals: ShutdownSignals
) -> None:
    server = WebServer(create_app(context), options)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    requested = asyncio.create_task(signals.requested.wait())
    died = asyncio.create_task(context.engine.died.wait())
    try:
        await asyncio.wait((asyncio.create_task(server.listening.wait()), serving), return_when=asyncio.FIRST_COMPLETED)
        if server.listening.is_set():
            _announce(context, options, listener.getsockname()[1])
        await asyncio.wait((requested, serving, died), return_when=asyncio.FIRST_COMPLETED)
        if died.done():
            print(
                f"leaving in {DEATH_GRACE_S:g} s, for a supervisor to start a new server", file=sys.stderr, flush=True
            )
            await asyncio.wait((requested, serving), timeout=DEATH_GRACE_S, return_when=asyncio.FIRST_COMPLETED)
        if context.engine.num_open:
            print(
                f"shutting down: {context.engine.num_open} open request(s) may go on for "
                f"{options.shutdown_timeout_s:g} s (interrupt again to kill)",
                file=sys.stderr,
                flush=True,
            )
        context.engine.refuse_new()
        server.should_exit = True
        await asyncio.wait((serving,), timeout=options.shutdown_timeout_s)
        if not serving.done():
            await context.engine.close()  # what is still open gets a proper error, and so comes to its end
        await serving
    finally:
        requested.cancel()
        died.cancel()


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


def _announce(context: ServerContext, options: ServerOptions, port: int) -> None:
    host = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    name = options.model_names[0]
    changed = context.defaults.changed()
    if changed:
        print(f"sampling defaults of this model's generation_config.json: {changed}")
    print(f"ready at {url}")
    print(
        f"try: curl {url}/v1/completions -H 'Content-Type: application/json' "
        f'-d \'{{"model": "{name}", "prompt": "def add(a, b):", "max_tokens": 32}}\'',
        flush=True,
    )

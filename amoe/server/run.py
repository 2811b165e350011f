"""The life of `amoe serve`: check, load, serve, drain, stop. The workers are its children; it is the front end itself,
or has several of them, which are its children too."""

from __future__ import annotations

import asyncio
import json
import logging
import shlex
import socket
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import setproctitle
import uvloop

from amoe.cluster.cluster import WorkerCluster
from amoe.cluster.front import connect, introduce, model_info, supervise
from amoe.cluster.front_ends import FrontEnds
from amoe.cluster.local import LocalCluster
from amoe.cluster.opening import open_cluster
from amoe.cluster.process import DEFAULT_ENTRY
from amoe.cluster.shutdown import ShutdownSignals
from amoe.config import EngineConfig
from amoe.engine.messages import Ready
from amoe.engine.model_info import ModelInfo
from amoe.engine.tokenizer import Tokenizer
from amoe.errors import ConfigError
from amoe.logs import LogOptions, configure
from amoe.metrics.engine import is_multiprocess
from amoe.models.config import load_model_config
from amoe.server.announcement import summary
from amoe.server.api_processes import ApiProcesses
from amoe.server.options import ServerOptions
from amoe.server.progress import LoadingProgress
from amoe.server.sampling import SamplingDefaults
from amoe.server.serving import say, serve_engine
from amoe.server.tracing import check_tracing
from amoe.server.web_server import address_of, bound_socket, check_certificate

logger = logging.getLogger(__name__)

T = TypeVar("T")

WORKER_GRACE_S = 10.0


class _Interrupted(Exception):
    """The user wants to leave before the server is ready."""


def run_server(
    config: EngineConfig,
    options: ServerOptions,
    logs: LogOptions | None = None,
    *,
    entry: str = DEFAULT_ENTRY,
    where: str = "",
) -> int:
    """Serve until a signal says stop. Returns the exit status.

    Args:
        entry: what makes a worker, see `amoe.cluster.process.LaunchSpec`.
        where: on which CPUs of the host the workers run, for the user.

    Raises:
        AmoeError: the server cannot start; the message is for the user.
    """
    setproctitle.setproctitle("amoe: server")  # which also hides the API keys of the command line
    logs = logs or LogOptions()
    configure(logs, "server")
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(config, options, logs, entry, where))
    except _Interrupted:
        say("interrupted while loading")
        return 130


async def _serve(config: EngineConfig, options: ServerOptions, logs: LogOptions, entry: str, where: str = "") -> int:
    check_model_directory(config.model)
    check_certificate(options)
    if options.otlp_traces_endpoint is not None:
        check_tracing(options.otlp_traces_endpoint)
    has_fronts = options.api_server_count > 1
    if not has_fronts and is_multiprocess():
        raise ConfigError(
            "PROMETHEUS_MULTIPROC_DIR is set: what others have counted there, or this server before it was started "
            "anew, would be added to its metrics: unset it (for --api-server-count, amoe makes its own)"
        )
    model = load_model_config(config.model)  # first: what is wrong with the checkpoint is said before all else
    tokenizer = Tokenizer(config.model, options.chat.chat_template)
    defaults = SamplingDefaults.from_checkpoint(config.model)
    with bound_socket(options) as listener:
        cluster = await open_cluster(config, options.executor, logs=logs, with_doors=has_fronts)
        signals = ShutdownSignals(cluster.kill)
        signals.install()
        try:
            with LoadingProgress(f"loading {config.model}") as progress:
                ready = await _unless_requested(signals, cluster.start(progress))
            info = model_info(config, ready, options.model_names[0])
            _warn_of_short_cache(info.max_model_len, config.max_model_len, model.max_position_embeddings)

            def on_listening() -> None:
                lines = summary(config, info, ready) + ([f"host: {where}"] if where else [])
                _announce(lines, options, defaults, listener)

            if has_fronts:
                return await _serve_by_others(cluster, ready, info, options, logs, listener, signals, on_listening)
            return await _serve_here(cluster, ready, tokenizer, defaults, options, listener, signals, on_listening)
        finally:
            await cluster.stop(WORKER_GRACE_S)
            logger.info("stopped")


async def _serve_here(
    cluster: WorkerCluster,
    ready: list[Ready],
    tokenizer: Tokenizer,
    defaults: SamplingDefaults,
    options: ServerOptions,
    listener: socket.socket,
    signals: ShutdownSignals,
    on_listening: Callable[[], None],
) -> int:
    front = connect(
        cluster,
        ready,
        name=options.model_names[0],
        tokenizer=tokenizer,
        heartbeat_timeout_s=options.heartbeat_timeout_s,
        stall_timeout_s=options.stall_timeout_s,
    )
    try:
        return await serve_engine(
            front.engine,
            options,
            defaults,
            listener,
            signals.requested,
            on_listening,
            admin=front.desk,
        )
    finally:
        await front.close()


async def _serve_by_others(
    cluster: WorkerCluster,
    ready: list[Ready],
    info: ModelInfo,
    options: ServerOptions,
    logs: LogOptions,
    listener: socket.socket,
    signals: ShutdownSignals,
    on_listening: Callable[[], None],
) -> int:
    """`_serve_here`, with the engines in API processes."""
    assert isinstance(cluster, LocalCluster), "checked with the flags"
    board = introduce(cluster, ready)
    fronts = FrontEnds(cluster)
    fronts.run()
    supervision = supervise(cluster, fronts, board)
    processes = ApiProcesses(cluster.config, fronts, supervision.desk, options, info, logs)
    try:
        return await processes.run(listener, signals.requested, on_listening)
    finally:
        await supervision.close()
        await fronts.close()


def _warn_of_short_cache(has: int, asked: int | None, trained: int) -> None:
    if has < (asked or trained):
        print(
            f"the KV cache holds {has} of the {trained} tokens that the model could take: raise "
            "--kv-cache-memory-bytes for longer sequences",
            file=sys.stderr,
        )


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


def _announce(
    lines: Sequence[str], options: ServerOptions, defaults: SamplingDefaults, listener: socket.socket
) -> None:
    port = listener.getsockname()[1] if options.uds is None else 0
    url, curl = address_of(options, port)
    changed = defaults.changed()
    if changed:
        print(f"sampling defaults of this model's generation_config.json: {changed}")
    print("\n".join(lines))
    print(f"ready at {url}")
    key = " -H 'Authorization: Bearer '$AMOE_API_KEY" if options.http.key_digests else ""
    body = {"model": options.model_names[0], "prompt": "def add(a, b):", "max_tokens": 32}
    print(
        f"try: curl {curl}/v1/completions{key} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}",
        flush=True,
    )

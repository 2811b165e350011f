"""The main of one of several front ends: `python -m amoe.server.api_process PARENT_PID`, with an `ApiSpec` on stdin.

It says on stdout when it listens. It leaves when the parent says so by SIGTERM, and with the parent.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from dataclasses import dataclass

import msgspec
import numpy as np
import setproctitle
import uvloop

from amoe.cluster.worker_main import die_with_parent
from amoe.config import EngineConfig
from amoe.engine.async_engine import AsyncEngine, ModelInfo
from amoe.engine.control import AsyncControlChannel
from amoe.engine.load import Front
from amoe.engine.tokenizer import Tokenizer
from amoe.logs import LogOptions, configure
from amoe.server.options import ServerOptions
from amoe.server.sampling import SamplingDefaults
from amoe.server.serving import serve_engine


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiSpec:
    """All that a front end is told; the descriptors are inherited.

    Attributes:
        owners: [num_layers, num_experts, R] where experts live; None: not known.
        front: which one it is.
        worker_fds: its ends of the sockets to the workers, by rank.
    """

    config: EngineConfig
    options: ServerOptions
    logs: LogOptions
    model: ModelInfo
    owners: list[list[list[int]]] | None
    front: Front
    listener_fd: int
    worker_fds: list[int]


async def _serve(spec: ApiSpec) -> int:
    requested = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, requested.set)
    channels = [await AsyncControlChannel.open(socket.socket(fileno=fd)) for fd in spec.worker_fds]
    engine = AsyncEngine(
        channels,
        spec.config,
        Tokenizer(spec.config.model, spec.options.chat.chat_template),
        spec.model,
        owners=None if spec.owners is None else np.asarray(spec.owners, np.int16),
        heartbeat_timeout_s=spec.options.heartbeat_timeout_s,
        stall_timeout_s=spec.options.stall_timeout_s,
        front=spec.front,
    )
    engine.run()
    with socket.socket(fileno=spec.listener_fd) as listener:
        return await serve_engine(
            engine,
            spec.options,
            SamplingDefaults.from_checkpoint(spec.config.model),
            listener,
            requested,
            on_listening=lambda: print("listening", flush=True),
        )


def main(parent_pid: int) -> int:
    """Serve to the end; returns the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(parent_pid)
    spec = msgspec.json.decode(sys.stdin.buffer.read(), type=ApiSpec)
    title = f"api {spec.front.index}"
    setproctitle.setproctitle(f"amoe: {title}")
    configure(spec.logs, title)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(spec))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))

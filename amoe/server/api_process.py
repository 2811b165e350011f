"""The main of one of several front ends: `python -m amoe.server.api_process PARENT_PID`, with an `ApiSpec` on stdin.

It hears of the workers over a link to its parent. It leaves when the parent says so by SIGTERM, and with the parent.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from dataclasses import dataclass

import msgspec
import setproctitle
import uvloop

from amoe.cluster.front_link import FrontLink
from amoe.cluster.parent_link import ParentLink
from amoe.cluster.worker_main import die_with_parent
from amoe.config import EngineConfig
from amoe.engine.async_engine import AsyncEngine, ModelInfo
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
        place: which of the API processes it is; front: as the workers know it, which no other life of it is.
        link_fd: its end of the link to the parent.
    """

    config: EngineConfig
    options: ServerOptions
    logs: LogOptions
    model: ModelInfo
    place: int
    front: Front
    listener_fd: int
    link_fd: int


async def _serve(spec: ApiSpec) -> int:
    requested = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, requested.set)
    engine = AsyncEngine(
        [],
        spec.config,
        Tokenizer(spec.config.model, spec.options.chat.chat_template),
        spec.model,
        heartbeat_timeout_s=spec.options.heartbeat_timeout_s,
        stall_timeout_s=spec.options.stall_timeout_s,
        front=spec.front,
        supervised=spec.config.survives_losses,
    )
    engine.run()
    parent = ParentLink(FrontLink.of_front(socket.socket(fileno=spec.link_fd)), engine)
    following = asyncio.create_task(parent.run(), name="amoe-parent")
    await parent.may_serve.wait()
    try:
        with socket.socket(fileno=spec.listener_fd) as listener:
            return await serve_engine(
                engine,
                spec.options,
                SamplingDefaults.from_checkpoint(spec.config.model),
                listener,
                requested,
                on_listening=parent.say_listening,
                admin=parent.desk if spec.config.survives_losses else None,
            )
    finally:
        following.cancel()


def main(parent_pid: int) -> int:
    """Serve to the end; returns the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(parent_pid)
    spec = msgspec.json.decode(sys.stdin.buffer.read(), type=ApiSpec)
    title = f"api {spec.place}"
    setproctitle.setproctitle(f"amoe: {title}")
    configure(spec.logs, title)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(spec))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))

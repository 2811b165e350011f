"""What is left when the server's process, which supervises its workers too, is killed: nothing.

Nobody is left to put streams together, so its requests are lost; whoever started it starts it again, on the same port.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from benchmarks.chaos.server import ChaosServer
from benchmarks.chaos.streams import Traffic, make_load

pytestmark = pytest.mark.cluster

QUIET = ("--uvicorn-log-level", "warning", "--disable-uvicorn-access-log")
APART = ("--attention-workers", "1", "--expert-workers", "2")
NUM_TOKENS = 1000  # that nobody has all of when the server is killed


def wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def can_listen(port: int) -> bool:
    with contextlib.suppress(OSError), socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", port))
        server.listen()
        return True
    return False


async def kill_under_traffic(server: ChaosServer) -> None:
    """Kill the server while it streams; every stream ends, whatever with."""
    traffic = Traffic(server.port, make_load(8, 0, NUM_TOKENS, 101).bodies)
    streams = asyncio.ensure_future(traffic.run())
    while traffic.num_tokens < 40:  # noqa: ASYNC110 - the traffic counts, and tells nobody
        await asyncio.sleep(0.01)
    os.kill(server.process.pid, signal.SIGKILL)
    answers = await streams
    assert all(answer.complaint(NUM_TOKENS) for answer in answers)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_nothing_survives_the_server(
    transport: str, checkpoint_factory: Callable[..., Path], tmp_path: Path
) -> None:
    """Nor does a worker that was started anew, nor one that is being started at the moment."""
    model = checkpoint_factory("qwen3_moe", max_position_embeddings=2 * NUM_TOKENS)
    names = set(os.listdir("/dev/shm"))
    with ChaosServer(tmp_path, str(model), *APART, "--transport", transport, *QUIET) as server:
        first = server.pids()
        server.kill("expert 0")
        wait_until(lambda: server.lives()["expert 0"] == ("serving", 1), "expert 0 serves again")
        server.kill("expert 1")
        wait_until(lambda: server.pids().get("expert 1", first["expert 1"]) != first["expert 1"], "its next life")
        pids = [child.pid for child in psutil.Process(server.process.pid).children(recursive=True)]
        assert len(pids) >= 3
        if transport == "shm":
            await kill_under_traffic(server)
        else:
            os.kill(server.process.pid, signal.SIGKILL)
        wait_until(lambda: all(map(is_gone, pids)), "all workers are gone")
        wait_until(lambda: can_listen(server.port), "the port is free")
        wait_until(lambda: set(os.listdir("/dev/shm")) <= names, "nothing has a name any more")


async def test_a_server_that_was_stopped_for_a_while_kills_nobody(
    checkpoint_factory: Callable[..., Path], tmp_path: Path
) -> None:
    """SIGSTOP of the supervisor (a laptop's lid, a debugger): it was deaf, its workers were not silent."""
    with ChaosServer(
        tmp_path, str(checkpoint_factory("qwen3_moe")), *APART, "--failure-timeout", "1", *QUIET
    ) as server:
        pids = server.pids()
        server.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(3)
        server.process.send_signal(signal.SIGCONT)
        (answer,) = await Traffic(server.port, make_load(1, 0, 40, 101).bodies).run()
        assert answer.complaint(40) == ""
        assert server.pids() == pids

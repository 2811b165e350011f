"""Several processes that answer HTTP over the same workers: `--api-server-count`.

They share the listening socket, and each has sockets of its own to every worker (`amoe.engine.shared_control`), so that
none waits for another. This process, their parent, only starts and stops: a front end that dies takes the server along.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

import amoe
from amoe.cluster.local import LocalCluster
from amoe.engine.async_engine import ModelInfo
from amoe.engine.load import Front
from amoe.logs import LogOptions
from amoe.server.api_process import ApiSpec
from amoe.server.options import ServerOptions
from amoe.server.serving import DEATH_GRACE_S, say
from amoe.server.web_server import CONNECTION_BACKLOG, FLUSH_GRACE_S

LEAVE_GRACE_S = 5.0  # beyond what a front end itself takes to drain


class ApiProcesses:
    """The front ends of one cluster.

    Args:
        cluster: started, with `options.api_server_count` fronts.
        model: what its workers have loaded.
    """

    def __init__(self, cluster: LocalCluster, options: ServerOptions, model: ModelInfo, logs: LogOptions) -> None:
        self._cluster = cluster
        self._options = options
        self._model = model
        self._logs = logs
        self._processes: list[asyncio.subprocess.Process] = []

    async def run(self, listener: socket.socket, requested: asyncio.Event, on_listening: Callable[[], None]) -> int:
        """Serve until `requested` is set, and what is open has ended, or a worker or front end dies.

        Returns:
            The exit status.
        """
        died = asyncio.Event()
        self._cluster.on_death = lambda _rank, _reason: died.set()
        listener.listen(CONNECTION_BACKLOG)  # whoever comes before they listen waits
        with tempfile.TemporaryDirectory(prefix="amoe-metrics-") as directory:
            try:
                for index in range(self._options.api_server_count):
                    self._processes.append(await self._start(index, listener, directory))
                exits = [asyncio.create_task(process.wait()) for process in self._processes]
                if await self._all_listen(exits):
                    on_listening()
                    events = [asyncio.create_task(event.wait()) for event in (requested, died)]
                    await asyncio.wait((*exits, *events), return_when=asyncio.FIRST_COMPLETED)
                    for event in events:
                        event.cancel()
                return await self._stop(exits, failed=not requested.is_set())
            finally:
                self._kill()

    async def _start(self, index: int, listener: socket.socket, directory: str) -> asyncio.subprocess.Process:
        sockets = self._cluster.front_sockets(index)
        spec = ApiSpec(
            config=self._cluster.config,
            options=self._options,
            logs=self._logs,
            model=self._model,
            owners=None if self._cluster.owners is None else self._cluster.owners.tolist(),
            front=Front(index=index, count=self._options.api_server_count),
            listener_fd=listener.fileno(),
            worker_fds=[each.fileno() for each in sockets],
        )
        root = str(Path(amoe.__file__).parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "amoe.server.api_process", str(os.getpid())),
            stdin=asyncio.subprocess.PIPE,  # not the command line, which everybody on the machine can read
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": directory, "PYTHONPATH": os.pathsep.join(paths)},
            pass_fds=(spec.listener_fd, *spec.worker_fds),
            start_new_session=True,  # Ctrl-C in the terminal is for the parent alone
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(spec))
        process.stdin.close()
        for each in sockets:
            each.close()
        return process

    async def _all_listen(self, exits: list[asyncio.Task[int]]) -> bool:
        """Wait until each has said so; False: one has gone instead."""
        said = asyncio.ensure_future(
            asyncio.gather(*(process.stdout.readline() for process in self._processes if process.stdout is not None))
        )
        waiting: list[asyncio.Future[Any]] = [said, *exits]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if said.done():
            return all(said.result())
        said.cancel()
        await asyncio.gather(said, return_exceptions=True)
        return False

    async def _stop(self, exits: list[asyncio.Task[int]], *, failed: bool) -> int:
        """Let them drain. When one has died or a worker has, the others notice by themselves, or are told."""
        if failed and not self._cluster.all_alive:
            await asyncio.wait(exits, timeout=DEATH_GRACE_S + LEAVE_GRACE_S)
        for process in self._processes:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
        await asyncio.wait(exits, timeout=self._options.shutdown_timeout_s + FLUSH_GRACE_S + LEAVE_GRACE_S)
        statuses = [process.returncode for process in self._processes]
        if failed and self._cluster.all_alive:
            say("an API process has gone: leaving, for a supervisor to start a new server")
        return 1 if failed or any(statuses) else 0

    def _kill(self) -> None:
        for process in self._processes:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()

"""Several processes that answer HTTP over the same workers: `--api-server-count`.

They share the listening socket, and each has sockets of its own to every worker (`amoe.engine.shared_control`), so that
none waits for another. This process, their parent, keeps the workers alive and moves experts; it tells them of it over
a link to each (`amoe.cluster.front_ends`). One that dies is started anew: what was open there has ended, what is open
at the others goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from pathlib import Path

import msgspec

import amoe
from amoe.cluster.admin import AdminDesk
from amoe.cluster.front_ends import FrontEnd, FrontEnds
from amoe.cluster.front_link import FrontLink
from amoe.config import EngineConfig
from amoe.engine.async_engine import ModelInfo
from amoe.engine.load import Front
from amoe.logs import LogOptions
from amoe.metrics.engine import forget_process
from amoe.policy.supervision import Crashes
from amoe.server.api_process import ApiSpec
from amoe.server.options import ServerOptions
from amoe.server.serving import DEATH_GRACE_S, say
from amoe.server.web_server import CONNECTION_BACKLOG, FLUSH_GRACE_S

logger = logging.getLogger(__name__)

LEAVE_GRACE_S = 5.0  # beyond what a front end itself takes to drain


class _Place:
    """One of the API processes, whichever life it is in.

    Attributes:
        process: of the present life; None: there is none.
        listening: the present life, or the last, has said that it does.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.process: Process | None = None
        self.listening = asyncio.Event()


class ApiProcesses:
    """The front ends of one cluster.

    Args:
        config: of the workers.
        fronts: where they are told of the workers; it runs.
        desk: where operators' orders are taken; None: nobody replaces workers, and API processes neither.
        model: what the workers have loaded.
    """

    def __init__(
        self,
        config: EngineConfig,
        fronts: FrontEnds,
        desk: AdminDesk | None,
        options: ServerOptions,
        model: ModelInfo,
        logs: LogOptions,
    ) -> None:
        self._config = config
        self._fronts = fronts
        self._desk = desk
        self._options = options
        self._model = model
        self._logs = logs
        self._numbers = itertools.count()
        self._places = [_Place(index) for index in range(options.api_server_count)]
        self._leaving = asyncio.Event()
        self._has_failed = False

    async def run(self, listener: socket.socket, requested: asyncio.Event, on_listening: Callable[[], None]) -> int:
        """Serve until `requested` is set, and what is open has ended, or nothing can go on.

        Returns:
            The exit status.
        """
        listener.listen(CONNECTION_BACKLOG)  # whoever comes before they listen waits
        with tempfile.TemporaryDirectory(prefix="amoe-metrics-") as directory:
            keepers = [
                asyncio.create_task(self._keep(place, listener.fileno(), directory), name=f"amoe-api-{place.index}")
                for place in self._places
            ]
            all_listen = asyncio.create_task(self._until_all_listen())
            events = [asyncio.create_task(_happened(event)) for event in (requested, self._fronts.died)]
            tasks = [all_listen, *keepers, *events]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if all_listen.done():
                    on_listening()
                    await asyncio.wait((*keepers, *events), return_when=asyncio.FIRST_COMPLETED)
                return await self._leave(keepers, failed=not requested.is_set())
            finally:
                self._signal(signal.SIGKILL)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _until_all_listen(self) -> None:
        for place in self._places:
            await place.listening.wait()

    async def _leave(self, keepers: list[asyncio.Task[None]], *, failed: bool) -> int:
        """Let them drain. Those whose workers are dead say why to whoever asks, and leave by themselves."""
        self._leaving.set()
        self._has_failed = failed
        if self._fronts.died.is_set():
            await asyncio.wait(keepers, timeout=DEATH_GRACE_S + LEAVE_GRACE_S)
        elif failed:
            say("the API processes cannot go on: leaving, for a supervisor to start a new server")
        self._signal(signal.SIGTERM)
        patience_s = self._options.shutdown_timeout_s + FLUSH_GRACE_S + LEAVE_GRACE_S
        done, late = await asyncio.wait(keepers, timeout=patience_s)
        errors = [error for keeper in done if (error := keeper.exception()) is not None]
        for error in errors:
            logger.error("an API process could not be looked after", exc_info=error)
        return 1 if self._has_failed or late or errors else 0

    def _signal(self, number: signal.Signals) -> None:
        for place in self._places:
            if place.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    place.process.send_signal(number)

    # -- one of them -------------------------------------------------------------------------------------------------

    async def _keep(self, place: _Place, listener_fd: int, directory: str) -> None:
        """See to it that one API process is there. Returns when that is of no use any more."""
        failure, loop = self._config.failure, asyncio.get_running_loop()
        crashes = Crashes(backoff_s=failure.backoff_s, max_backoff_s=failure.max_backoff_s)
        is_first = True
        while not self._leaving.is_set():
            began = loop.time()
            place.listening.clear()
            try:
                status = await self._live(place, listener_fd, directory)
                how = f"API process {place.index} {_how_it_ended(status)}"
            except OSError as error:
                status, how = 1, f"API process {place.index} could not be started: {error}"
            if self._leaving.is_set():
                # One that has not come so far as to listen for signals is ended by them.
                is_orderly = status == 0 or (status == -signal.SIGTERM and not place.listening.is_set())
                self._has_failed |= not is_orderly
                return
            crashes = crashes.after(loop.time() - began)
            gives_up = self._desk is None or crashes.count >= failure.max_crashes
            if gives_up or (is_first and not place.listening.is_set()):
                say(how)
                return
            is_first = False
            logger.error("%s: what was open there has ended; it is started anew", how)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._leaving.wait(), crashes.pause_s)

    async def _live(self, place: _Place, listener_fd: int, directory: str) -> int:
        """One life, to its end. Returns its exit status.

        Raises:
            OSError: it could not be started.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            front = FrontEnd(next(self._numbers), FrontLink.of_parent(ours), place.listening)
            try:
                process = await self._start(place.index, front.number, listener_fd, theirs.fileno(), directory)
            except BaseException:
                front.hang_up()
                raise
        place.process = process
        if self._leaving.is_set():  # meanwhile
            process.terminate()
        hearing = asyncio.create_task(front.listen(self._desk, self._fronts.on_front_gone))
        ending, silence = asyncio.create_task(process.wait()), asyncio.create_task(front.fall_silent())
        self._fronts.add(front)
        try:
            await asyncio.wait((ending, silence), return_when=asyncio.FIRST_COMPLETED)
            if not ending.done():
                logger.error("API process %d (pid %d) hangs: it is killed", place.index, process.pid)
                process.kill()
            return await ending
        finally:
            place.process = None
            self._fronts.remove(front)
            front.hang_up()
            silence.cancel()
            await asyncio.gather(hearing, silence, ending, return_exceptions=True)
            forget_process(process.pid, directory)

    async def _start(self, index: int, number: int, listener_fd: int, link_fd: int, directory: str) -> Process:
        spec = ApiSpec(
            config=self._config,
            options=self._options,
            logs=self._logs,
            model=self._model,
            place=index,
            front=Front(index=number, count=self._options.api_server_count),
            listener_fd=listener_fd,
            link_fd=link_fd,
        )
        root = str(Path(amoe.__file__).parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "amoe.server.api_process", str(os.getpid())),
            stdin=PIPE,  # not the command line, which everybody on the machine can read
            env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": directory, "PYTHONPATH": os.pathsep.join(paths)},
            pass_fds=(spec.listener_fd, spec.link_fd),
            start_new_session=True,  # Ctrl-C in the terminal is for the parent alone
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(spec))
        process.stdin.close()
        return process


async def _happened(event: asyncio.Event) -> None:
    await event.wait()


def _how_it_ended(status: int) -> str:
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-status).name}"
    return f"exited with status {status}"

"""One worker process as its parent sees it: started, watched, listened to, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec

import amoe
from amoe.cluster.channel import ready_message
from amoe.cluster.control_ends import ControlEnds
from amoe.cluster.environment import inherited
from amoe.cluster.launcher import WorkerHandle
from amoe.cluster.process import InheritedControl, LaunchSpec, title_of
from amoe.cluster.spare import SpareProcess, tell
from amoe.config import EngineConfig
from amoe.engine.control import AsyncControlChannel
from amoe.engine.cpus import threads_per_worker
from amoe.engine.messages import Loading, Ready, Stop
from amoe.engine.shared_control import put_through
from amoe.errors import EngineDeadError

_TAIL_LINES = 20
_DRAIN_TIMEOUT_S = 2.0


class WorkerProcess:
    """A running worker. Make it with `spawn`, in the event loop that will watch it; end it with `close`.

    Attributes:
        rank, incarnation, title: who it is.
        pid: its process and process group.
        channel: the server's end of its control channel.
        exited: set once it has ended and has been reaped.
        is_ready: it has said so.
    """

    def __init__(
        self,
        spec: LaunchSpec,
        process: subprocess.Popen[bytes],
        channel: AsyncControlChannel,
        on_exit: Callable[[WorkerHandle], None],
        door: socket.socket | None,
    ) -> None:
        self.rank = spec.rank
        self.incarnation = spec.incarnation
        self.title = title_of(spec.config.placement, spec.rank)
        self.pid = process.pid
        self.channel = channel
        self.exited = asyncio.Event()
        self.is_ready = False
        self._process = process
        self._door = door
        self._on_exit = on_exit
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._forwarding = asyncio.create_task(self._forward_output(), name=f"amoe-output-{self.rank}")
        self._pidfd = os.pidfd_open(process.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._reap)

    @classmethod
    async def spawn(
        cls,
        make_spec: Callable[[InheritedControl], LaunchSpec],
        descriptors: tuple[int, ...],
        on_exit: Callable[[WorkerHandle], None],
        *,
        with_door: bool = False,
    ) -> WorkerProcess:
        """Start a worker's process; `on_exit` is called in the event loop when it has ended.

        Args:
            make_spec: what it is told, around its end of the control channel.
            descriptors: what it inherits beside that, under the same numbers.
            with_door: API processes will send it requests; otherwise this process does.
        """
        with ControlEnds(with_door=with_door) as ends:
            channel = await AsyncControlChannel.open(ends.control)
            try:
                spec = make_spec(ends.inherited)
                title = title_of(spec.config.placement, spec.rank)
                process = start_process(spec.config, title, (*ends.descriptors, *descriptors))
                with contextlib.suppress(OSError):  # it has gone: whoever watches it will say so
                    tell(process, msgspec.json.encode(spec))
            except BaseException:
                await channel.close()
                raise
        return cls(spec, process, channel, on_exit, ends.door)

    @classmethod
    async def adopt(
        cls,
        spare: SpareProcess,
        make_spec: Callable[[InheritedControl], LaunchSpec],
        on_exit: Callable[[WorkerHandle], None],
    ) -> WorkerProcess:
        """Let a spare process be a worker.

        Raises:
            OSError: it has gone meanwhile; it is given back.
        """
        spec = make_spec(spare.ends.inherited)
        try:
            channel = await AsyncControlChannel.open(spare.ends.control)
            process = spare.release(msgspec.json.encode(spec))
        except BaseException:
            spare.close()
            raise
        return cls(spec, process, channel, on_exit, spare.ends.door)

    async def wait_ready(self, on_loading: Callable[[WorkerHandle, Loading], None]) -> Ready:
        """Listen until the worker is ready.

        Raises:
            ConfigError: it cannot start; the message is for the user.
            EngineDeadError: it failed or died.
        """
        ready = await ready_message(self.channel, self.title, lambda message: on_loading(self, message))
        if ready is not None:
            self.is_ready = True
            return ready
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.exited.wait(), _DRAIN_TIMEOUT_S)
            await asyncio.wait_for(asyncio.shield(self._forwarding), _DRAIN_TIMEOUT_S)
        raise EngineDeadError(f"{self.describe_exit()} while starting{self.describe_output()}")

    def let_in(self, front: int) -> socket.socket:
        """Connect API process number `front` with it; returns that one's socket, which is the caller's to close."""
        assert self._door is not None, "it was started for several API processes"
        return put_through(self._door, front)

    def seems_to_run(self) -> bool:
        """Some thread of it uses a processor, waits for one, or for a disk."""
        try:
            threads = list(Path(f"/proc/{self.pid}/task").iterdir())
            return any((thread / "stat").read_text().rpartition(")")[2].split()[0] in "RD" for thread in threads)
        except (OSError, IndexError):
            return False

    def request_stop(self) -> None:
        """Ask it to leave. One that is not ready yet has nothing to finish, and does not listen: it is killed."""
        if not self.is_ready:
            self.kill()
        with contextlib.suppress(OSError):
            self.channel.send(Stop())

    def kill(self) -> None:
        """SIGKILL to the worker and whatever it has started. Nothing happens if it has ended."""
        if not self.exited.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def describe(self) -> str:
        """Who it is, for a person: `expert 0 (pid 12)`."""
        return f"{self.title} (pid {self.pid})"

    def describe_exit(self) -> str:
        """How it has ended, for a person: `expert 0 (pid 12) was killed by SIGSEGV`."""
        status = self._process.returncode
        who = self.describe()
        if status is None:
            return f"{who} closed its control channel"
        if status >= 0:
            return f"{who} exited with status {status}"
        try:
            return f"{who} was killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"{who} was killed by signal {-status}"

    def describe_output(self) -> str:
        """Its last lines of output, each on a line of its own; empty if it wrote nothing."""
        return "".join(f"\n  | {line}" for line in self._tail)

    async def close(self) -> None:
        """Give everything back, after it has exited. Idempotent."""
        # Something that the worker has started may hold the pipe open for ever.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._forwarding, _DRAIN_TIMEOUT_S)
        await self.channel.close()
        if self._door is not None:
            self._door.close()
        await asyncio.sleep(0)  # the event loop closes the pipe in its next turn

    def _reap(self) -> None:
        if self._process.poll() is None:
            return
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.exited.set()
        self._on_exit(self)

    async def _forward_output(self) -> None:
        """Copy what the worker prints to this process's standard error, line by line, and remember the end of it."""
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), self._process.stdout
        )
        try:
            while line := await _read_line(reader):
                text = line.decode(errors="replace")
                self._tail.append(text.rstrip("\n"))
                with contextlib.suppress(OSError, ValueError):  # nobody reads it, or it is closed
                    sys.stderr.write(text)
        finally:
            transport.close()


async def _read_line(reader: asyncio.StreamReader) -> bytes:
    """The next line; what there is of it if it is very long; empty at the end."""
    try:
        return await reader.readuntil()
    except asyncio.IncompleteReadError as error:
        return error.partial
    except asyncio.LimitOverrunError as error:
        return await reader.readexactly(error.consumed)


def start_process(config: EngineConfig, title: str, descriptors: tuple[int, ...]) -> subprocess.Popen[bytes]:
    """A process that runs `amoe.cluster.worker_main`, inherits `descriptors` under the same numbers, and waits for its
    launch spec, see `spare.tell`."""
    # -P: a file of the user's working directory must not shadow a module.
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "amoe.cluster.worker_main", title, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=_environment(config),
        pass_fds=descriptors,
        start_new_session=True,  # Ctrl-C in the terminal is for the server alone
    )


def _environment(config: EngineConfig) -> dict[str, str]:
    """The child's environment: of ours what is good for it, and the path on which this very amoe was found."""
    root = str(Path(amoe.__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return inherited(threads_per_worker(config), os.environ) | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
    }

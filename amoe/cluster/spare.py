"""A process that has imported all that a worker needs, and waits to become one: a worker that dies is back sooner."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Callable

StartProcess = Callable[[tuple[int, ...]], "subprocess.Popen[bytes]"]


class SpareProcess:
    """See above. Either `release` or `close` ends it.

    Args:
        start: starts the process with a pipe for its standard input; it is told what it has to inherit.

    Attributes:
        socket: what will be the server's end of its control channel.
        control_fd: ... and the worker's.
    """

    def __init__(self, start: StartProcess) -> None:
        self.socket, theirs = socket.socketpair()
        self.control_fd = theirs.fileno()
        try:
            with theirs:
                self._process = start((self.control_fd,))
        except BaseException:
            self.socket.close()
            raise
        self._is_mine = True

    def release(self, launch_spec: bytes) -> subprocess.Popen[bytes]:
        """Tell it which worker it is. The process, which is returned, and the socket are others' to look after now.

        Raises:
            OSError: it has gone; `close` has to be called.
        """
        stdin = self._process.stdin
        assert stdin is not None
        if self._process.poll() is not None:
            raise ProcessLookupError("the spare process has gone")
        stdin.write(launch_spec)
        stdin.close()
        self._is_mine = False
        return self._process

    def close(self) -> None:
        """Nobody needs it. Idempotent."""
        if not self._is_mine:
            return
        self._is_mine = False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.socket.close()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

"""A process that has imported all that a worker needs, and waits to become one: a worker that dies is back sooner."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable

from amoe.cluster.control_ends import ControlEnds

StartProcess = Callable[[tuple[int, ...]], "subprocess.Popen[bytes]"]


def tell(process: subprocess.Popen[bytes], launch_spec: bytes) -> None:
    """Tell a process that waits for it which worker it is. A spec fits into a pipe: this does not wait.

    Raises:
        OSError: it has gone.
    """
    assert process.stdin is not None
    with process.stdin:
        process.stdin.write(launch_spec)


class SpareProcess:
    """See above. Either `release` or `close` ends it.

    Args:
        start: starts the process; it is told what that has to inherit.
        with_door: see `ControlEnds`.

    Attributes:
        ends: what will be its control channel.
    """

    def __init__(self, start: StartProcess, *, with_door: bool = False) -> None:
        with ControlEnds(with_door=with_door) as self.ends:
            self._process = start(self.ends.descriptors)
        self._is_mine = True

    def release(self, launch_spec: bytes) -> subprocess.Popen[bytes]:
        """Tell it which worker it is. The process, which is returned, and `ends` are others' to look after now.

        Raises:
            OSError: it has gone; `close` has to be called.
        """
        if self._process.poll() is not None:
            raise ProcessLookupError("the spare process has gone")
        tell(self._process, launch_spec)
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
        self.ends.close()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

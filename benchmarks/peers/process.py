"""Talks with a driver: a process that holds an engine and runs what it is told."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from amoe.errors import AmoeError

ROOT = Path(__file__).parents[2]
_STOP_TIMEOUT_S = 20.0
_LOG_LINES = 15


def end_like_an_error(number: signal.Signals) -> None:
    """Let a signal raise `SystemExit`: children are stopped, and what was measured is written."""

    def leave(received: int, _: FrameType | None) -> None:
        sys.exit(128 + received)

    signal.signal(number, leave)


class Child:
    """A process in a group of its own, its errors in a file; gone, with all its children, after `stop`.

    Args:
        log: where its standard error goes, and its output unless that is read.
        is_read: whether its output is read.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path, *, is_read: bool = False) -> None:
        self._log = log
        self._is_read = is_read
        with log.open("w", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if is_read else file,
                stderr=file,
                cwd=ROOT,
                env={**os.environ, **env},
                start_new_session=True,
            )

    def last_words(self) -> str:
        """The end of its log."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-_LOG_LINES:])

    def stop(self) -> None:
        """Let it end: a driver when its input does, a server when it is told. Then make it. Idempotent."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        if not self._is_read:
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


class Driver:
    """One of `benchmarks.peers.drivers`, started.

    Args:
        name: for messages.
        start_timeout_s, answer_timeout_s: how long it may take to load the model, and to answer.

    Attributes:
        about: what it has told of its engine.
        is_idle: whether it has answered all that it was asked.
        start_s: seconds from its start until the model was loaded.

    Raises:
        AmoeError: it could not start; the end of its log is in the message.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str],
        log: Path,
        *,
        start_timeout_s: float = 600.0,
        answer_timeout_s: float = 600.0,
    ) -> None:
        self._name = name
        self._answer_timeout_s = answer_timeout_s
        self._rest = b""
        self.is_idle = True
        began = time.monotonic()
        self._child = Child(command, {"PYTHONPATH": str(ROOT), **env}, log, is_read=True)
        try:
            self.about: dict[str, Any] = self._read(start_timeout_s)["ready"]
        except BaseException:
            self.stop()
            raise
        self.start_s = time.monotonic() - began

    @property
    def pid(self) -> int:
        """Of its process; there may be children."""
        return self._child.process.pid

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and wait for the answer.

        Raises:
            AmoeError: it has ended, or does not answer.
        """
        assert self._child.process.stdin is not None
        self.is_idle = False
        try:
            self._child.process.stdin.write((json.dumps(request) + "\n").encode())
            self._child.process.stdin.flush()
        except OSError as error:
            raise AmoeError(f"{self._name} has ended:\n{self._child.last_words()}") from error
        answer = self._read(self._answer_timeout_s)
        self.is_idle = True
        return answer

    def stop(self) -> None:
        """End it. Idempotent."""
        self._child.stop()

    def _read(self, timeout_s: float) -> dict[str, Any]:
        assert self._child.process.stdout is not None
        descriptor = self._child.process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise AmoeError(f"{self._name} did not answer within {timeout_s:g} s:\n{self._child.last_words()}")
            data = os.read(descriptor, 1 << 20)
            if not data:
                raise AmoeError(f"{self._name} has ended:\n{self._child.last_words()}")
            self._rest += data
        line, self._rest = self._rest.split(b"\n", 1)
        return json.loads(line)

"""A running `amoe serve`, for tests that come as its users do."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from types import TracebackType

import httpx


class ServedModel:
    """The built-in model (or another one) behind a real server, within a `with` block.

    Attributes:
        url: where it listens.
        output: what it has printed.
    """

    def __init__(self, *flags: str, model: str | None = None) -> None:
        arguments = [*([model] if model else []), "--port", "0", *flags]
        # A process group of its own, so that a signal to the tests does not reach it.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "amoe.cli", "serve", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.output: list[str] = []
        self.url = self._until_ready()
        # Nobody else reads on: a full pipe would stop the server.
        self._reader = threading.Thread(target=self._read_on, daemon=True)
        self._reader.start()

    def _until_ready(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line)
            if (match := re.search(r"ready at (http://\S+)", line)) is not None:
                return match[1]
        raise AssertionError("the server did not start:\n" + "".join(self.output))

    def _read_on(self) -> None:
        assert self.process.stdout is not None
        self.output.extend(self.process.stdout)

    @property
    def pid(self) -> int:
        return self.process.pid

    def works(self) -> bool:
        """It answers a request correctly: as it answers it always."""
        body = {"prompt": "def add(a, b):", "max_tokens": 8, "temperature": 0}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)
        return answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 8

    def until_idle(self) -> bool:
        """Wait until no sequence runs at any worker."""
        for _ in range(300):
            load = httpx.get(f"{self.url}/load", timeout=60).json()
            if load["num_requests_running"] + load["num_requests_waiting"] == 0:
                return True
            time.sleep(0.1)
        return False

    def tracebacks(self) -> str:
        """What it has printed from its first traceback on; nobody's request may cause one."""
        starts = [index for index, line in enumerate(self.output) if "Traceback" in line]
        return "".join(self.output[max(0, starts[0] - 1) : starts[0] + 60]) if starts else ""

    def __enter__(self) -> ServedModel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        self._reader.join(10)

    def printed(self) -> str:
        """All that it has printed."""
        return "".join(self.output)

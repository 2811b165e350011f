"""`deploy/ray/serve.yaml` on a Ray cluster of one node, as Ray Serve runs it, but for the model's path and the port."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml
from ray.cluster_utils import Cluster

from amoe.builtin import builtin_model_path

YAML = Path(__file__).parents[1] / "deploy" / "ray" / "serve.yaml"
PATIENCE_S = 240.0


class ServedByRay:
    """Make it, and wait `until_healthy`; end it with `close`.

    Attributes:
        url: of the proxy.
    """

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        config = yaml.safe_load(YAML.read_text(encoding="utf-8"))
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        config["http_options"] |= {"host": "127.0.0.1", "port": port}
        (application,) = config["applications"]
        application["args"] |= {"model": str(builtin_model_path()), "dtype": "float32"}
        application["deployments"][0]["health_check_period_s"] = 1
        (file := directory / "serve.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        self._cluster = cluster
        command = [sys.executable, "-m", "ray.serve.scripts", "run", "--address", cluster.address, str(file)]
        self._log = (directory / "serve.log").open("w+")
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)

    def is_healthy(self) -> bool:
        assert self._process.poll() is None, self.output()
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/health", timeout=60).status_code == 200
        return False

    def until_healthy(self) -> None:
        self.until(self.is_healthy, "it is healthy")

    def until(self, holds: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < deadline, f"never: {what}\n{self.output()}"
            time.sleep(0.1)

    def until_idle(self, *, but: int = 0) -> None:
        """So many sequences run, as `/load` tells it, which hears of the workers twice a second."""

        def holds() -> bool:
            load = httpx.get(f"{self.url}/load", timeout=60)
            return load.status_code == 200 and load.json()["num_requests_running"] == but

        self.until(holds, f"{but} sequence(s) run")

    def actors(self, title: str) -> set[int]:
        """Processes of the cluster's actors whose title has this in it."""
        found = set()
        for raylet in (info.process.pid for info in self._cluster.head_node.all_processes["raylet"]):
            for process in psutil.Process(raylet).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if title in " ".join(process.cmdline()):
                        found.add(process.pid)
        return found

    def kill(self, title: str) -> None:
        """kill -9 of the one actor of that title."""
        (pid,) = self.actors(title)
        os.kill(pid, signal.SIGKILL)
        self.until(lambda: not psutil.pid_exists(pid), "it is gone")

    def complete(self, max_tokens: int = 12) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json=body_of(max_tokens), timeout=PATIENCE_S)

    def stream(self, max_tokens: int = 12) -> Iterator[str]:
        """The text of each chunk."""
        body = {**body_of(max_tokens), "stream": True}
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=PATIENCE_S) as response:
            assert response.status_code == 200
            for line in filter(None, response.iter_lines()):
                if line == "data: [DONE]":
                    return
                yield json.loads(line.removeprefix("data: "))["choices"][0]["text"]
        raise AssertionError("the stream has ended without [DONE]")

    def output(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def close(self) -> None:
        """As Ctrl-C does: the application is deleted, and with it its workers."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(60)
        self._log.close()


def body_of(max_tokens: int) -> dict[str, Any]:
    return {"prompt": "def add(a, b):", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}

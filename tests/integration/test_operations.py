"""`amoe serve` in operation: keys, logs, odd clients, and workers that stop. Few servers, each for many questions."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

KEY = "key-of-the-test"
CPUS = sorted(os.sched_getaffinity(0))
LONG = {"prompt": [5, 6, 7], "max_tokens": 200, "temperature": 0, "ignore_eos": True, "stream": True}


class Server:
    """A running `amoe serve`; its output goes to a file."""

    def __init__(self, model: Path, directory: Path, *flags: str, environment: dict[str, str] | None = None) -> None:
        self.log = directory / "server.log"
        command = [sys.executable, "-m", "amoe.cli", "serve", str(model), "--threads-per-worker", "1", *flags]
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | (environment or {})
            )
        self.address = self._wait_until_ready()
        self.workers = psutil.Process(self.process.pid).children(recursive=True)

    def _wait_until_ready(self) -> str:
        for _ in range(2400):
            if (match := re.search(r"^ready at (\S+)$", self.text, re.MULTILINE)) is not None:
                return match[1]
            assert self.process.poll() is None, self.text
            time.sleep(0.05)
        raise AssertionError(self.text)

    @property
    def text(self) -> str:
        return self.log.read_text()

    def printed(self) -> str:
        """All that it has printed."""
        return self.text

    def worker(self, role: str) -> psutil.Process:
        """The process whose title says so."""
        (found,) = [worker for worker in self.workers if f"amoe: {role}" in " ".join(worker.cmdline())]
        return found

    def stop(self) -> int:
        for worker in self.workers:
            if worker.is_running():
                worker.resume()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def traffic(make_client: Callable[[], httpx.Client], num_clients: int = 1) -> Iterator[list[int]]:
    """Clients that ask all the time; yields the status of each answer so far."""
    over, statuses = threading.Event(), []

    def ask() -> None:
        with make_client() as http:
            while not over.is_set():
                with http.stream("POST", "/v1/completions", json=LONG) as response:
                    for _ in response.iter_bytes():
                        if over.is_set():
                            return
                statuses.append(response.status_code)

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(num_clients)]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        over.set()
        for thread in threads:
            thread.join(60)


def stop_until_replaced(server: Server, http: httpx.Client, role: str) -> set[int]:
    """SIGSTOP, for ever; what /health has said until another worker served in that place."""
    worker = server.worker(role)
    told = server.text.count("serves again")
    worker.suspend()
    seen = set()
    while server.text.count("serves again") == told:
        seen.add(http.get("/health").status_code)
        time.sleep(0.1)
    assert not worker.is_running()  # never are there two of them
    server.workers = psutil.Process(server.process.pid).children(recursive=True)
    return seen


@pytest.fixture(scope="class")
def apart(checkpoint_factory: Callable[..., Path], tmp_path_factory: Any) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("disaggregated")
    (directory / "amoe.yaml").write_text(
        "port: 0\nexpert_workers: 1\nlog-format: json\nstall-timeout: 2\nrequest-body-timeout: 1\nhost: 0.0.0.0\n"
    )
    server = Server(
        checkpoint_factory("qwen3_moe"),
        directory,
        *("--config", str(directory / "amoe.yaml"), "--host", "127.0.0.1", "--enable-log-requests"),
        *("--cpu-bind", f"{CPUS[0]};{CPUS[-1]}"),
        environment={"AMOE_API_KEY": f"other,{KEY}"},
    )
    yield server
    assert server.stop() == 0
    assert KEY not in server.text
    assert "Traceback" not in server.text


class TestDisaggregated:
    """Two workers apart, keys from the environment, JSON logs, a configuration file."""

    @pytest.fixture
    def http(self, apart: Server) -> Iterator[httpx.Client]:
        with self.client(apart) as client:
            yield client

    @staticmethod
    def client(apart: Server) -> httpx.Client:
        return httpx.Client(base_url=apart.address, headers={"authorization": f"Bearer {KEY}"}, timeout=60)

    @pytest.mark.parametrize("role", ["attention 0", "expert 0"])
    def test_a_stopped_worker_is_replaced_and_nobody_notices(self, apart: Server, http: httpx.Client, role):
        with traffic(lambda: self.client(apart)) as statuses:
            while not statuses:
                time.sleep(0.02)
            assert stop_until_replaced(apart, http, role) == {200}
            before = len(statuses)
            while len(statuses) == before:
                time.sleep(0.02)
        assert set(statuses) == {200}

    def test_the_key_is_needed_and_shown_nowhere(self, apart: Server, http: httpx.Client):
        assert http.get("/v1/models").status_code == 200
        assert httpx.get(f"{apart.address}/v1/models", timeout=60).status_code == 401
        assert httpx.get(f"{apart.address}/health", timeout=60).status_code == 200
        for process in (psutil.Process(apart.process.pid), *apart.workers):
            assert KEY not in " ".join(process.cmdline())

    def test_the_server_itself_needs_no_torch(self, apart: Server, http: httpx.Client):
        """It starts in half the time without, and takes a third of the memory."""
        assert http.post("/v1/completions", json={"prompt": [5, 6], "max_tokens": 3}).status_code == 200
        with_torch = {
            process.pid
            for process in (psutil.Process(apart.process.pid), *apart.workers)
            if any("libtorch" in area.path for area in process.memory_maps())
        }
        workers = {process.pid for process in apart.workers if "amoe: " in " ".join(process.cmdline())}
        assert apart.process.pid not in with_torch
        assert len(with_torch & workers) == 2, "one for attention, one for experts"

    def test_workers_keep_to_their_cpus_and_the_server_to_none(self, apart: Server, http: httpx.Client):
        """Those too that have taken the places of others."""

        def cpus_of(process: psutil.Process) -> set[tuple[int, ...]]:
            return {tuple(sorted(os.sched_getaffinity(thread.id))) for thread in process.threads()}

        assert cpus_of(apart.worker("attention 0")) == {(CPUS[0],)}
        assert cpus_of(apart.worker("expert 0")) == {(CPUS[-1],)}
        assert cpus_of(psutil.Process(apart.process.pid)) == {tuple(CPUS)}
        assert f"bound to CPUs {CPUS[0]}; {CPUS[-1]}" in apart.text

    def test_lines_are_json_and_cannot_be_forged(self, apart: Server, http: httpx.Client):
        headers = {"x-request-id": "line-test"}
        answer = http.post("/v1/completions", json={"prompt": [5, 6], "max_tokens": 3}, headers=headers)
        assert answer.json()["id"] == "cmpl-line-test"
        http.get("/v1/models/x%0a{%22level%22:%22forged%22}")
        while "forged" not in apart.text:  # a line is written when its answer has been sent
            time.sleep(0.02)
        lines = [json.loads(line) for line in apart.text.splitlines() if line.startswith("{")]
        admitted, ended = [line for line in lines if line.get("request_id") == "line-test"]
        assert (admitted["message"], admitted["max_tokens"], "prompts" in admitted) == ("request admitted", 3, False)
        assert (ended["status"], ended["prompt_tokens"], ended["generated_tokens"]) == (200, 2, 3)
        assert ended["seconds"] >= ended["ttft_s"] >= ended["queue_s"] >= 0
        assert [line for line in lines if line.get("path", "").startswith("/v1/models/x\n")]
        assert not [line for line in lines if line["level"] == "forged"]

    @pytest.mark.parametrize(
        ("sent", "status"),
        [
            (b"\x16\x03\x01 what is this\r\n\r\n", b"400"),
            (b"GET / HTTP/1.1\r\nHost: x\r\nx-big: " + b"y" * 70_000 + b"\r\n\r\n", b"431"),
            (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"x: y\r\n" * 20_000, b"431"),
            (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9x\r\n\r\n{}", b"400"),
            (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}a", b"400"),
            (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"400"),
            (b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n", b"400"),
            (
                b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer \xff\xfe\r\n\r\n",
                b"401",
            ),
        ],
    )
    def test_what_is_no_proper_request(self, apart: Server, http: httpx.Client, sent: bytes, status: bytes):
        with socket.create_connection(self.endpoint(apart), timeout=60) as connection:
            connection.sendall(sent)
            answer = b""
            while part := connection.recv(65536):
                answer += part
        assert answer.split(b" ")[1] == status
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == int(status)
        assert http.get("/health").status_code == 200

    def test_half_a_body_holds_nothing(self, apart: Server, http: httpx.Client):
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        head += 'Content-Type: application/json\r\nContent-Length: 500\r\n\r\n{"prompt": "a'
        with socket.create_connection(self.endpoint(apart), timeout=60) as connection:
            connection.sendall(head.encode())
            assert http.get("/load").json()["num_sequences_open"] == 0
            answer = b""
            while part := connection.recv(65536):  # until the server closes
                answer += part
        assert b" 408 " in answer and b"did not come in within 1 s" in answer

    @staticmethod
    def endpoint(apart: Server) -> tuple[str, int]:
        url = httpx.URL(apart.address)
        assert url.port is not None
        return url.host, url.port


@pytest.fixture(scope="class")
def together(checkpoint_factory: Callable[..., Path], tmp_path_factory: Any) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("colocated")
    path = directory / "amoe.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stale:
        stale.bind(str(path))  # as a killed server leaves it
    server = Server(
        checkpoint_factory("qwen3_moe"),
        directory,
        *("--colocated", "2", "--uds", str(path), "--max-num-seqs", "4", "--max-waiting", "4"),
    )
    assert server.address == f"unix:{path}"
    yield server
    assert server.stop() == 0
    assert not path.exists()
    assert "Traceback" not in server.text


class TestColocated:
    """Two workers that are both, on a Unix socket, with the timeouts that users have."""

    @staticmethod
    def client(together: Server) -> httpx.Client:
        transport = httpx.HTTPTransport(uds=together.address.removeprefix("unix:"))
        return httpx.Client(transport=transport, base_url="http://localhost", timeout=60)

    def test_load_is_not_sickness(self, together: Server):
        """More than twice what it holds: refused at once, and healthy all the time."""
        with self.client(together) as http, traffic(lambda: self.client(together), num_clients=30) as statuses:
            seen = set()
            for looks in range(600):
                seen.add(http.get("/health").status_code)
                if looks >= 40 and len(set(statuses)) > 1:
                    break
                time.sleep(0.1)
        assert seen == {200}
        assert set(statuses) == {200, 503}

    def test_a_stopped_worker_is_replaced_and_nobody_notices(self, together: Server):
        """It had half of the experts, and half of the sequences."""
        with self.client(together) as http, traffic(lambda: self.client(together), num_clients=4) as statuses:
            assert stop_until_replaced(together, http, "worker 1") == {200}
            while len(statuses) < 4:
                time.sleep(0.02)
        assert set(statuses) == {200}
        assert "has given no sign of life for" in together.text

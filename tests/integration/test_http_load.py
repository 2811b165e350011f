"""`amoe serve` as users meet it: a process, a port, the `openai` client, many streams, and nothing left behind."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from tokenizers import Tokenizer

from amoe.builtin import builtin_model_path
from tests.checkpoints import hf_greedy

NUM_STREAMS = 64
NUM_PROMPTS = 16
MAX_NEW = 40


class ServerProcess:
    """`amoe serve` of the built-in model in float32."""

    def __init__(self, log: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "amoe.cli", "serve", "--port", "0", "--dtype", "float32"]
        command += ["--threads-per-worker", "1", *flags]
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        self.url = self._until_ready()

    def _until_ready(self) -> str:
        for _ in range(2400):
            if (match := re.search(r"^ready at (\S+)$", self.log.read_text(), re.MULTILINE)) is not None:
                return match[1]
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def printed(self) -> str:
        """All that it has printed."""
        return self.log.read_text()

    def processes(self) -> list[psutil.Process]:
        server = psutil.Process(self.process.pid)
        return [server, *server.children(recursive=True)]

    def num_fds(self) -> int:
        return sum(process.num_fds() for process in self.processes())

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        values = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        assert values, f"no metric {name}"
        return sum(map(float, values))

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    running = ServerProcess(tmp_path_factory.mktemp("serve") / "log", "--colocated", "2", "--max-num-seqs", "32")
    yield running
    pids = [process.pid for process in running.processes()]
    assert running.stop() == 0
    assert not any(psutil.pid_exists(pid) for pid in pids)


def client_of(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def source_prompts() -> list[str]:
    text = Path(os.__file__).read_text()
    return [text[start : start + 30 + 17 * index] for index, start in enumerate(range(1000, 17000, 1000))]


def test_64_streams_of_mixed_lengths_have_the_right_text(server: ServerProcess) -> None:
    tokenizer = Tokenizer.from_file(str(builtin_model_path() / "tokenizer.json"))
    prompts = source_prompts()
    references = hf_greedy(builtin_model_path(), [tokenizer.encode(p).ids for p in prompts], MAX_NEW)
    client = client_of(server)

    def stream(index: int) -> tuple[str, str | None, int]:
        chunks = client.completions.create(
            model="amoe-builtin",
            prompt=prompts[index % NUM_PROMPTS],
            max_tokens=1 + index % MAX_NEW,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        text, reason, count = "", None, 0
        for chunk in chunks:
            if chunk.usage is not None:
                count = chunk.usage.completion_tokens
            for choice in chunk.choices:
                text += choice.text
                reason = choice.finish_reason or reason
        return text, reason, count

    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        results = list(pool.map(stream, range(NUM_STREAMS)))
    for index, (text, reason, count) in enumerate(results):
        length = 1 + index % MAX_NEW
        expected = tokenizer.decode(references[index % NUM_PROMPTS].token_ids[:length])
        assert (reason, count) == ("length", length)
        # A sequence may end inside a character, which the stream replaces as `decode` does.
        assert text == expected


def test_1000_requests_leave_nothing_behind(server: ServerProcess) -> None:
    def request(http: httpx.Client, index: int) -> None:
        body = {
            "model": "amoe-builtin",
            "prompt": f"x{index} = ",
            "max_tokens": 1 + index % 3,
            "stream": index % 2 == 0,
        }
        assert http.post("/v1/completions", json=body).status_code == 200

    def requests(count: int) -> None:
        """Eight at a time; the connections are closed afterwards."""
        with httpx.Client(base_url=server.url, timeout=120) as http, ThreadPoolExecutor(8) as pool:
            list(pool.map(functools.partial(request, http), range(count)))

    requests(40)  # threads and caches that stay
    time.sleep(1.2)
    before, processes = server.num_fds(), len(server.processes())
    requests(1000)
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "token_slots_used")
    left = {}
    for _ in range(200):  # the figures come with heartbeats, and a connection ends a moment after its client has gone
        left = {name: server.metric(f"amoe:{name}") for name in (*names, "micro_queue_depth")}
        descriptors = server.num_fds()
        if not any(left.values()) and descriptors <= before:
            break
        time.sleep(0.1)
    assert not any(left.values()), left
    assert descriptors <= before
    assert len(server.processes()) == processes


def test_chat_streams(server: ServerProcess) -> None:
    chunks = client_of(server).chat.completions.create(
        model="amoe-builtin", messages=[{"role": "user", "content": "def add(a, b):"}], max_tokens=8, stream=True
    )
    deltas = [choice for chunk in chunks for choice in chunk.choices]
    assert deltas[0].delta.role == "assistant"
    assert deltas[-1].finish_reason in ("stop", "length")


def test_disconnect_frees_the_sequence(server: ServerProcess) -> None:
    body = {"model": "amoe-builtin", "prompt": "import", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        next(response.iter_lines())
    for _ in range(600):
        if server.metric("amoe:num_requests_running") == 0 and server.metric("amoe:kv_cache_usage_perc") == 0:
            return
        time.sleep(0.1)
    raise AssertionError("the sequence is still there")


def test_a_full_queue_answers_503_and_the_server_lives(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path / "log", "--max-num-seqs", "1", "--max-waiting", "1")
    body = {"model": "amoe-builtin", "prompt": "import", "max_tokens": 400, "ignore_eos": True}

    def post(_: int) -> httpx.Response:
        return httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)

    with ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(post, range(8)))
    refused = [response for response in responses if response.status_code == 503]
    assert refused
    assert all(int(response.headers["retry-after"]) >= 1 for response in refused)
    assert sum(response.status_code == 200 for response in responses) == 8 - len(refused) >= 2
    assert server.stop() == 0

"""The servers that are compared: how each is started, and when it answers."""

from __future__ import annotations

import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from amoe.errors import AmoeError
from benchmarks.peers.process import Child
from benchmarks.peers.setup import STEP_TOKENS, Setup

_START_TIMEOUT_S = 300.0
_POLL_S = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerPlan:
    """How to start a server.

    Attributes:
        command: up to the port, which is appended.
        model: its name in requests.
        files: of the checkpoint.
    """

    name: str
    command: Sequence[str]
    model: str
    log: Path
    files: Sequence[Path]
    env: Mapping[str, str] = field(default_factory=dict)


class Server:
    """A running server, within a `with` block.

    Attributes:
        port: of 127.0.0.1.
        ready_s: seconds from its start until it said that it is healthy.

    Raises:
        AmoeError: it could not start; the end of its log is in the message.
    """

    def __init__(self, plan: ServerPlan) -> None:
        self.plan = plan
        self.port = _free_port()
        self.started_at = time.monotonic()
        self._child = Child([*plan.command, str(self.port)], plan.env, plan.log)
        try:
            self._wait()
        except BaseException:
            self._child.stop()
            raise
        self.ready_s = time.monotonic() - self.started_at

    @property
    def pid(self) -> int:
        """Of its first process."""
        return self._child.process.pid

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.stop()

    def _wait(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._is_healthy():
            if self._child.process.poll() is not None or time.monotonic() > deadline:
                raise AmoeError(f"the server of {self.plan.name} did not start:\n{self._child.last_words()}")
            time.sleep(_POLL_S)

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as answer:
                return answer.status == 200
        except (OSError, urllib.error.HTTPError):
            return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def server_plans(setup: Setup, names: Sequence[str], num_slots: int) -> list[ServerPlan]:
    """Of those that are there and serve; `num_slots` sequences at once."""
    plans = {"amoe": _amoe(setup)}
    if setup.vllm_python is not None:
        plans["vLLM"] = _vllm(setup, setup.vllm_python)
    if setup.llama_server is not None:
        plans["llama.cpp"] = _llama(setup, setup.llama_server, num_slots)
    return [plans[name] for name in names if name in plans]


def _amoe(setup: Setup) -> ServerPlan:
    command = [sys.executable, "-m", "amoe.cli", "serve", str(setup.model), "--served-model-name", "model"]
    command += ["--no-enable-prefix-caching", *setup.amoe_flags]
    log = setup.logs / "amoe-server.log"
    return ServerPlan(name="amoe", command=[*command, "--port"], model="model", log=log, files=_shards(setup))


def _vllm(setup: Setup, python: str) -> ServerPlan:
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(setup.model)]
    command += ["--served-model-name", "model", "--dtype", "bfloat16", "--no-enable-prefix-caching"]
    command += ["--max-num-batched-tokens", str(STEP_TOKENS), "--host", "127.0.0.1", "--port"]
    log = setup.logs / "vllm-server.log"
    return ServerPlan(name="vLLM", command=command, model="model", log=log, files=_shards(setup), env=setup.vllm_env)


def _llama(setup: Setup, program: Path, num_slots: int) -> ServerPlan:
    command = [str(program), "-m", str(setup.gguf), "-t", str(setup.threads), "-tb", str(setup.threads)]
    # A slot per sequence, all in one cache of the size that the others have; no cache of prompts in memory.
    command += ["-np", str(num_slots), "-c", str(setup.kv_tokens), "-b", str(STEP_TOKENS), "--cache-ram", "0"]
    assert setup.gguf is not None, "the server is not taken for found without it"
    log = setup.logs / "llama-server.log"
    return ServerPlan(name="llama.cpp", command=[*command, "--port"], model="model", log=log, files=[setup.gguf])


def _shards(setup: Setup) -> list[Path]:
    return sorted(setup.model.glob("*.safetensors"))

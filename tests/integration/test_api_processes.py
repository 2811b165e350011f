"""`--api-server-count`: several processes answer HTTP over the same workers."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from tests.served import ServedModel

BODY = {"prompt": "def add(a, b):", "max_tokens": 8, "temperature": 0}


FLAGS = ("--api-server-count", "2", "--colocated", "2", "--shutdown-timeout", "5")


@pytest.fixture(scope="module")
def lasting() -> Iterator[ServedModel]:
    with ServedModel(*FLAGS) as server:
        yield server


@pytest.fixture
def served() -> Iterator[ServedModel]:
    """One that the test may end."""
    with ServedModel(*FLAGS) as server:
        yield server


def family(server: ServedModel) -> dict[str, psutil.Process]:
    """Children by title."""
    return {process.cmdline()[0]: process for process in psutil.Process(server.pid).children(recursive=True)}


def complete(server: ServedModel) -> str:
    answer = httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def counted(server: ServedModel) -> float:
    """Generated tokens, as told by whichever process answers."""
    text = httpx.get(f"{server.url}/metrics", timeout=60).text
    return sum(float(value) for value in re.findall(r"^amoe:generation_tokens_total\{.*\} (\S+)$", text, re.MULTILINE))


def test_all_processes_serve_the_same_model(lasting: ServedModel) -> None:
    with ThreadPoolExecutor(16) as pool:
        texts = set(pool.map(lambda _: complete(lasting), range(48)))
    assert len(texts) == 1
    served_by = {line.split(" INFO ")[1].split(":")[0] for line in lasting.output if "request ended" in line}
    assert served_by == {"api 0", "api 1"}
    assert {counted(lasting) for _ in range(8)} == {48.0 * 8}, "every process tells the sum"
    assert httpx.get(f"{lasting.url}/health").status_code == 200


def test_a_client_that_goes_frees_its_sequence(lasting: ServedModel) -> None:
    with httpx.stream(
        "POST", f"{lasting.url}/v1/completions", json=BODY | {"max_tokens": 1500, "stream": True}, timeout=60
    ) as answer:
        next(answer.iter_lines())
    assert lasting.until_idle()


def test_a_process_that_goes_takes_the_server_along(served: ServedModel) -> None:
    children = family(served)
    os.kill(children["amoe: api 1"].pid, signal.SIGKILL)
    assert served.process.wait(60) == 1
    _, alive = psutil.wait_procs(children.values(), timeout=30)
    assert not alive


def test_a_worker_that_dies_takes_the_server_along(served: ServedModel) -> None:
    children = family(served)
    os.kill(children["amoe: worker 1"].pid, signal.SIGKILL)
    assert served.process.wait(60) == 1
    _, alive = psutil.wait_procs(children.values(), timeout=30)
    assert not alive


def test_sigterm_lets_open_streams_end(served: ServedModel) -> None:
    with httpx.stream(
        "POST", f"{served.url}/v1/completions", json=BODY | {"max_tokens": 200, "stream": True}, timeout=60
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        served.process.terminate()
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert served.process.wait(60) == 0

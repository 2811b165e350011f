"""`--api-server-count`: several processes answer HTTP over the same workers, which are supervised for all of them."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from benchmarks.chaos.faults import Fault
from benchmarks.chaos.residue import children_of
from benchmarks.chaos.run import run
from benchmarks.chaos.server import SPARE, ChaosServer
from benchmarks.chaos.streams import Answer, Load, make_load
from benchmarks.chaos.ties import clear_requests
from tests.integration.test_chaos import VOCAB_SIZE, assert_unharmed
from tests.served import ServedModel

pytestmark = pytest.mark.cluster

BODY = {"prompt": "def add(a, b):", "max_tokens": 8, "temperature": 0}
TWO = ("--api-server-count", "2")
FLAGS = (*TWO, "--colocated", "2", "--shutdown-timeout", "5")
APART = (*TWO, "--attention-workers", "2", "--expert-workers", "2", "--uvicorn-log-level", "warning")


@pytest.fixture(scope="module")
def lasting() -> Iterator[ServedModel]:
    with ServedModel(*FLAGS) as server:
        yield server


def family(pid: int) -> dict[str, psutil.Process]:
    """Children by title, without those that have ended."""
    return {title: child for title, child in children_of(pid) if title != "zombie"}


def complete(server: ServedModel) -> str:
    answer = httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def counted(server: ServedModel) -> float:
    """Generated tokens, as told by whichever process answers."""
    text = httpx.get(f"{server.url}/metrics", timeout=60).text
    return sum(float(value) for value in re.findall(r"^amoe:generation_tokens_total\{.*\} (\S+)$", text, re.MULTILINE))


def have_served(printed: str) -> set[str]:
    return {line.split(" INFO ")[1].split(":")[0] for line in printed.splitlines() if "request ended" in line}


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.05)


def test_all_processes_serve_the_same_model(lasting: ServedModel) -> None:
    with ThreadPoolExecutor(16) as pool:
        texts = set(pool.map(lambda _: complete(lasting), range(48)))
    assert len(texts) == 1
    assert have_served("".join(lasting.output)) == {"api 0", "api 1"}
    assert {counted(lasting) for _ in range(8)} == {48.0 * 8}, "every process tells the sum"
    assert httpx.get(f"{lasting.url}/health", timeout=60).status_code == 200


def test_a_client_that_goes_frees_its_sequence(lasting: ServedModel) -> None:
    with httpx.stream(
        "POST", f"{lasting.url}/v1/completions", json=BODY | {"max_tokens": 1500, "stream": True}, timeout=60
    ) as answer:
        next(answer.iter_lines())
    assert lasting.until_idle()


def test_a_process_that_dies_is_started_anew(lasting: ServedModel) -> None:
    """What it was asked for is given up by the workers; the other one's streams go on, and its counts stay."""
    text, tokens = complete(lasting), counted(lasting)
    first = family(lasting.pid)
    with httpx.stream(
        "POST", f"{lasting.url}/v1/completions", json=BODY | {"max_tokens": 1500, "stream": True}, timeout=60
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        os.kill(first["amoe: api 0"].pid, signal.SIGKILL)
        os.kill(first["amoe: api 1"].pid, signal.SIGKILL)
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)
    until(lambda: {"amoe: api 0", "amoe: api 1"} <= family(lasting.pid).keys(), "they are back")
    assert complete(lasting) == text, "who comes while nobody listens waits"
    assert lasting.until_idle()
    assert counted(lasting) >= tokens + 8
    now = family(lasting.pid)
    assert {title for title in now if now[title].pid != first[title].pid} == {"amoe: api 0", "amoe: api 1"}


def test_sigterm_lets_open_streams_end() -> None:
    with (
        ServedModel(*FLAGS) as served,
        httpx.stream(
            "POST", f"{served.url}/v1/completions", json=BODY | {"max_tokens": 200, "stream": True}, timeout=60
        ) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        children = family(served.pid)
        served.process.terminate()
        assert [line for line in lines if line][-1] == "data: [DONE]"
        assert served.process.wait(60) == 0
        _, alive = psutil.wait_procs(children.values(), timeout=30)
        assert not alive


def test_in_lockstep_a_worker_that_dies_takes_the_server_along() -> None:
    """There nobody replaces anybody."""
    with ServedModel(*FLAGS, "--schedule", "lockstep") as served:
        children = family(served.pid)
        os.kill(children["amoe: worker 1"].pid, signal.SIGKILL)
        assert served.process.wait(60) == 1
        _, alive = psutil.wait_procs(children.values(), timeout=30)
        assert not alive


def told_of_losses(server: ChaosServer) -> tuple[float, ...]:
    """Workers that were lost, that are back, and that serve; as told by whichever process answers."""
    told = server.metrics()
    return told["worker_losses_total"], told["worker_respawns_total"], told["expert_workers_serving"]


async def undisturbed(server: ChaosServer, model: Path, load: Load) -> tuple[Load, list[Answer]]:
    """Of these requests those whose answers are clear, and what they are."""
    return clear_requests(model, load, (await run(server, load)).answers)


async def test_workers_die_and_nobody_notices(checkpoint_factory: Callable[..., Path], tmp_path: Path) -> None:
    model = checkpoint_factory("qwen3_moe")
    with ChaosServer(tmp_path, str(model), *APART) as server:
        faults = [
            Fault(kind="kill", workers=("expert 0",), at=0.1),
            Fault(kind="kill", workers=("attention 0",), at=0.3),
        ]
        load, oracle = await undisturbed(server, model, make_load(72, 8, 40, VOCAB_SIZE))
        before = server.residue()
        assert_unharmed(await run(server, load, faults), oracle, load)
        assert server.leaks(before) == []
        assert have_served(server.printed()) == {"api 0", "api 1"}
        # Whichever process answers says the same, once it has heard, and each loss is counted once.
        until(lambda: all(told_of_losses(server) == (2, 2, 2) for _ in range(8)), "two were lost, and are back")
        # Nobody waits for an API process that is stopped; when it goes on it hears all that has happened, in order.
        stopped = family(server.process.pid)["amoe: api 0"]
        stopped.suspend()
        lives = server.lives()["expert 1"][1]
        server.kill("expert 1")
        until(lambda: server.lives()["expert 1"] == ("serving", lives + 1), "it serves again, and the other one knows")
        stopped.resume()
        again, already = make_load(16, 0, 40, VOCAB_SIZE), len(server.printed())
        while "api 0" not in have_served(server.printed()[already:]):  # the kernel chooses who answers
            answers = (await run(server, again)).answers
            assert [answer.complaint(again.max_tokens) for answer in answers] == [""] * 16
        everything = [*family(server.process.pid).values()]
        server.process.kill()
        _, alive = psutil.wait_procs(everything, timeout=30)
        assert not alive


async def test_scaling_under_traffic(checkpoint_factory: Callable[..., Path], tmp_path: Path) -> None:
    """With a warm spare, and with an API process that dies meanwhile: what an operator has asked for goes on."""
    model = checkpoint_factory("qwen3_moe")
    with ChaosServer(tmp_path, str(model), *APART, "--warm-spare") as server:
        load, oracle = await undisturbed(server, model, make_load(24, 4, 40, VOCAB_SIZE))
        before = server.residue()
        spare = family(server.process.pid)[SPARE].pid
        server.admin("POST", "/admin/scale?wait=false", {"expert_workers": 3})
        while [action["state"] for action in server.cluster()["actions"]] != ["done"]:
            assert_unharmed(await run(server, load), oracle, load)
        assert server.lives()["expert 2"] == ("serving", 0)
        assert server.pids()["expert 2"] == spare
        os.kill(family(server.process.pid)["amoe: api 1"].pid, signal.SIGKILL)
        narrower = await asyncio.to_thread(server.admin, "POST", "/admin/scale", {"expert_workers": 2})
        assert [action["state"] for action in narrower["actions"]] == ["done", "done"]
        assert "expert 2" not in server.lives()
        until(lambda: "amoe: api 1" in family(server.process.pid), "it is back")
        assert_unharmed(await run(server, load), oracle, load)
        assert {len(server.cluster()["actions"]) for _ in range(8)} == {2}
        assert server.leaks(before) == []

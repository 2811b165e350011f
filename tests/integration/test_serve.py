"""`amoe serve` as users run it: real processes, signals and a real model, a tiny one."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import torch

from amoe.models.config import load_model_config
from amoe.models.loader import Blocks, load_model
from amoe.models.reference import forward, greedy


class Served:
    """A running `amoe serve`."""

    def __init__(self, model: Path, *flags: str) -> None:
        self.model = model
        command = [sys.executable, "-m", "amoe.cli", "serve", str(model), "--port", "0", *flags]
        # A process group of its own, so that a signal to the tests does not reach it.
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        assert self.process.stdout is not None
        self.output: list[str] = []
        self.url = self.until_line(r"ready at (http://\S+)")[1]
        self.workers = psutil.Process(self.process.pid).children(recursive=True)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def until_line(self, pattern: str) -> re.Match[str]:
        """Wait for a line of output."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line)
            if (match := re.match(pattern, line)) is not None:
                return match
        raise AssertionError("".join(self.output))

    def printed(self) -> str:
        """What has been read so far of all that it prints."""
        return "".join(self.output)

    def wait(self) -> int:
        """Exit status; checks that no worker is left."""
        assert self.process.stdout is not None
        self.output.extend(self.process.stdout)
        status = self.process.wait()
        _, alive = psutil.wait_procs(self.workers, timeout=30)
        assert not alive
        return status

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)


@pytest.fixture
def serve(checkpoint_factory: Callable[..., Path]) -> Iterator[Callable[..., Served]]:
    with contextlib.ExitStack() as stack:

        def start(*flags: str) -> Served:
            served = Served(checkpoint_factory("qwen3_moe", max_position_embeddings=2 * NUM_TOKENS), *flags)
            stack.callback(served.client.close)
            stack.callback(served.process.kill)
            return served

        yield start


def text_of(stream: openai.Stream) -> tuple[str, str | None]:
    """The text of a stream of completions, and how it ended."""
    text, finish_reason = "", None
    for chunk in stream:
        text += chunk.choices[0].text
        finish_reason = chunk.choices[0].finish_reason
    return text, finish_reason


NUM_TOKENS = 600  # enough to do something to the server in the middle of them, on a machine that is busy elsewhere
LONG = {"prompt": [5, 6, 7], "max_tokens": NUM_TOKENS, "temperature": 0, "extra_body": {"ignore_eos": True}}


def wait_for_metric(url: str, name: str) -> None:
    """Workers tell of themselves with their next heartbeat, not at once."""
    for _ in range(1200):
        if name in httpx.get(f"{url}/metrics", timeout=60).text:
            return
        time.sleep(0.05)
    raise AssertionError(f"no {name} in /metrics")


def test_serves_and_drains(serve: Callable[..., Served]):
    # A worker that stands still for a while is not replaced here.
    served = serve("--colocated", "2", "--served-model-name", "tiny", "other", "--failure-timeout", "60")
    assert [model.id for model in served.client.models.list()] == ["tiny", "other"]
    assert "amoe: server" in psutil.Process(served.process.pid).cmdline()[0]
    whole = served.client.completions.create(model="tiny", **LONG)
    assert whole.usage.completion_tokens == NUM_TOKENS
    assert httpx.get(f"{served.url}/health", timeout=60).status_code == 200
    wait_for_metric(served.url, "amoe:block_batch_size_bucket")

    stream = served.client.completions.create(model="other", stream=True, **LONG)
    first = next(iter(stream))
    served.workers[0].suspend()
    served.signal(signal.SIGTERM)
    served.until_line("shutting down: 1 open")
    served.workers[0].resume()
    text, finish_reason = text_of(stream)
    assert first.choices[0].text + text == whole.choices[0].text
    assert finish_reason == "length"
    assert served.wait() == 0
    assert not [line for line in served.output if "Traceback" in line]


def test_in_lockstep_a_dead_worker_is_told_at_once(serve: Callable[..., Served]):
    """There nobody can go on without it; see test_supervision.py for the other schedules."""
    served = serve("--expert-workers", "1", "--schedule", "lockstep", "--disable-uvicorn-access-log")
    assert len(served.workers) >= 2
    stream = served.client.completions.create(model=None, stream=True, **LONG)
    next(iter(stream))
    served.workers[0].suspend()
    (expert,) = [worker for worker in served.workers if "expert" in " ".join(worker.cmdline())]
    expert.kill()
    served.workers[0].resume()
    with pytest.raises(openai.APIError, match="was killed by SIGKILL"):
        text_of(stream)
    assert httpx.get(f"{served.url}/health", timeout=60).status_code == 503
    with pytest.raises(openai.InternalServerError, match="was killed by SIGKILL"):
        served.client.completions.create(model=None, **LONG)
    assert served.wait() == 1  # by itself, so that a supervisor starts a new one
    assert not [line for line in served.output if "Traceback" in line]


def test_requests_that_outlast_the_drain_get_an_error(serve: Callable[..., Served]):
    served = serve("--shutdown-timeout", "0.1", "--failure-timeout", "60")
    stream = served.client.completions.create(model=None, stream=True, **LONG)
    next(iter(stream))
    served.workers[0].suspend()
    served.signal(signal.SIGTERM)
    with pytest.raises(openai.APIError, match="the server has stopped"):
        text_of(stream)
    served.workers[0].resume()
    assert served.wait() == 0
    assert not [line for line in served.output if "Traceback" in line or "ERROR" in line]


def test_second_interrupt_kills(serve: Callable[..., Served]):
    served = serve()
    stream = served.client.completions.create(model=None, stream=True, **LONG)
    next(iter(stream))
    served.workers[0].suspend()
    served.signal(signal.SIGINT)
    served.until_line("shutting down: 1 open")
    served.signal(signal.SIGINT)
    assert served.wait() == 130
    stream.close()


def test_log_probabilities_of_a_prompt(serve: Callable[..., Served]):
    """What evaluation harnesses send: token ids, echo and logprobs, also streaming and also without any new token."""
    served = serve("--expert-workers", "1", "--dtype", "float32", "--max-num-batched-tokens", "16")
    path = served.model
    model = load_model(path, config := load_model_config(path), Blocks.whole(config), dtype=torch.float32, device="cpu")
    prompt = [7, 11, 13, 17, 19, 23] * 7
    fields = {"model": None, "prompt": prompt, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1234}
    whole = served.client.completions.create(max_tokens=2, **fields).choices[0]
    told = whole.logprobs
    assert told.token_logprobs[0] is None
    assert told.top_logprobs[0] is None
    tokens = [*prompt, *(int(i) for i in greedy(model, prompt, 2))]
    with torch.inference_mode():
        expected = torch.log_softmax(forward(model, tokens), dim=-1)[:-1]
    chosen = expected[range(len(expected)), tokens[1:]].tolist()
    assert told.token_logprobs[1:] == pytest.approx(chosen, abs=1e-4)
    best = [max(top.values()) for top in told.top_logprobs[1:]]
    assert best == pytest.approx(expected.amax(dim=-1).tolist(), abs=1e-4)

    alone = served.client.completions.create(max_tokens=0, **fields)
    assert alone.choices[0].logprobs.token_logprobs[1:] == pytest.approx(chosen[: len(prompt) - 1], abs=1e-4)
    assert (alone.choices[0].finish_reason, alone.usage.completion_tokens) == ("length", 0)

    parts = [chunk.choices[0] for chunk in served.client.completions.create(max_tokens=2, stream=True, **fields)]
    assert "".join(part.text for part in parts) == whole.text
    assert [value for part in parts for value in part.logprobs.token_logprobs][1:] == pytest.approx(chosen, abs=1e-4)


def test_usage_tells_what_capacity_has_taken(serve: Callable[..., Served]):
    served = serve("--capacity-factor", "0.5", "--capacity-phase", "both")
    prompt = [5, 6, 7, 8] * 12
    capacities = {}
    for choice in ("exact", "best_effort"):
        body = {"capacity": choice, "droppable_spans": [[0, 4]]}
        stream = served.client.completions.create(
            model=None,
            prompt=prompt,
            max_tokens=4,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=body,
        )
        *_, last = stream
        capacities[choice] = last.usage.model_extra["capacity"]
    exact, best_effort = capacities["exact"], capacities["best_effort"]
    assert exact["pairs"] > 0
    assert (exact["pairs_dropped"], exact["pairs_rerouted"], exact["gate_mass_lost"]) == (0, 0, 0.0)
    assert 0 < best_effort["pairs_dropped"] < best_effort["pairs"]
    assert 0 < best_effort["gate_mass_lost"] < 1

"""`amoe serve --quantization int8`: real processes answer what the int8 weights come to, while experts move too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tokenizers import Tokenizer

from amoe.builtin import builtin_model_path
from amoe.kernels import native
from amoe.kernels.attention import AttentionBatch, ChunkSpan
from amoe.models.config import load_model_config
from amoe.models.loader import Blocks, load_native_model
from amoe.models.native_model import NativeModel
from benchmarks.chaos.residue import children_of
from tests.served import ServedModel

pytestmark = pytest.mark.skipif(not native.is_available(), reason="the native kernels are not built")

PROMPTS = ("def add(a, b):\n", "import os\n\nfor name in os.listdir")
NUM_NEW = 12
KEY = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """Greedy answers of the int8 model in this process, every token from a whole prefill."""
    path = builtin_model_path()
    config = load_model_config(path)
    context = native.make_context(torch.float32, 2)
    model = load_native_model(path, config, Blocks.whole(config), context, dtype=torch.float32, quantize=True)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    answers = []
    for prompt in PROMPTS:
        token_ids = tokenizer.encode(prompt).ids
        count = len(token_ids)
        for _ in range(NUM_NEW):
            token_ids.append(next_token(model, token_ids))
        answers.append(tokenizer.decode(token_ids)[len(tokenizer.decode(token_ids[:count])) :])
    return answers


@torch.inference_mode()
def next_token(model: NativeModel, token_ids: list[int]) -> int:
    count, blocks = len(token_ids), -(-len(token_ids) // 16)
    kv, none = model.new_kv_cache(blocks, 16), torch.empty(0, dtype=torch.int64)
    span = ChunkSpan(0, count, torch.arange(blocks), count)
    batch = AttentionBatch(torch.arange(count), 0, none.view(0, 0), none, 0, [span])
    residual = model.embed(torch.tensor(token_ids))
    for layer in range(model.config.num_layers):
        out = model.attention(layer, residual, torch.arange(count), kv, batch)
        residual = model.experts(layer, out.moe_input, out.topk_ids, out.topk_weights, residual=out.residual)
    return int(model.argmax(model.head(residual[-1:]))[0])


def answers_of(server: ServedModel) -> list[str]:
    body: dict[str, Any] = {"prompt": list(PROMPTS), "max_tokens": NUM_NEW, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
    return [choice["text"] for choice in answer.raise_for_status().json()["choices"]]


def test_one_worker_answers_what_the_weights_come_to(expected: list[str]) -> None:
    with ServedModel("--quantization", "int8", "--dtype", "float32") as server:
        assert answers_of(server) == expected
        assert not server.tracebacks()


def test_experts_move_and_a_worker_dies_while_it_gives_them_away(expected: list[str]) -> None:
    """Its next life, or the newcomer, has them all the same; the answers stay."""
    placement = ("--attention-workers", "1", "--expert-workers", "1", "--max-expert-workers", "2")
    with ServedModel("--quantization", "int8", "--dtype", "float32", *placement, "--admin-key", "secret") as server:
        assert answers_of(server) == expected
        with ThreadPoolExecutor(1) as thread:
            scaling = thread.submit(scale, server, 2)
            until(lambda: {w["title"]: w["state"] for w in cluster_of(server)["workers"]}.get("expert 1") == "serving")
            os.kill(pid_of(server, "expert 0"), signal.SIGKILL)
            answer = scaling.result(120)
        assert answer.status_code in (200, 409, 500), answer.text  # it was too late, or is told
        assert answers_of(server) == expected
        until(lambda: all(worker["state"] == "serving" for worker in cluster_of(server)["workers"]))
        for count in (2, 1):
            assert scale(server, count).status_code == 200
            assert answers_of(server) == expected
        assert cluster_of(server)["missing"] == 0
        assert not server.tracebacks()


def scale(server: ServedModel, count: int) -> httpx.Response:
    return httpx.post(f"{server.url}/admin/scale", json={"expert_workers": count}, headers=KEY, timeout=120)


def cluster_of(server: ServedModel) -> dict[str, Any]:
    return httpx.get(f"{server.url}/admin/cluster", headers=KEY, timeout=60).raise_for_status().json()


def pid_of(server: ServedModel, title: str) -> int:
    return dict(children_of(server.pid))[f"amoe: {title}"].pid


def until(condition: Callable[[], bool]) -> None:
    """Wait for it: for a minute at most."""
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it never came to that")


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--device", "cuda"), "--quantization int8 is for --device cpu, not cuda"),
        (("--device", "emulated:h100"), "--quantization int8 is for --device cpu, not emulated:h100"),
        (("--kernels", "torch"), "--quantization needs the native kernels: not --kernels torch"),
    ],
)
def test_what_cannot_be_had_is_one_line(flags: tuple[str, ...], complaint: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "amoe.cli", "serve", "--quantization", "int8", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode != 0
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr

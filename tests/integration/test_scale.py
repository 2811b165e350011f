"""Expert workers and replicas come and go under traffic: nobody gets an error, or another token than before."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import urllib.error
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from amoe.kernels import native
from benchmarks.chaos.run import run
from benchmarks.chaos.server import KEY, ChaosServer
from benchmarks.chaos.streams import Answer, Load, make_load
from benchmarks.chaos.ties import clear_requests

pytestmark = pytest.mark.cluster

FLAGS = ("--attention-workers", "1", "--expert-workers", "1", "--max-expert-workers", "3")
QUIET = ("--uvicorn-log-level", "warning", "--disable-uvicorn-access-log")


async def under_traffic(server: ChaosServer, load: Load, oracle: Sequence[Answer], work: Callable[[], Any]) -> Any:
    """The result of `work`, which is done in a thread while the load comes again and again, undisturbed."""
    action = asyncio.ensure_future(asyncio.to_thread(work))
    is_last = False
    while not is_last:
        is_last = action.done()  # once more after it is done
        answers = (await run(server, load)).answers
        assert {answer.complaint(load.max_tokens) for answer in answers} == {""}
        assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in oracle]
    return await action


def num_serving(cluster: dict[str, Any]) -> int:
    return sum(worker["role"] == "experts" and worker["state"] == "serving" for worker in cluster["workers"])


def amoe_scale(server: ChaosServer, *flags: str) -> subprocess.CompletedProcess[str]:
    url = f"http://127.0.0.1:{server.port}"
    command = [sys.executable, "-m", "amoe.cli", "scale", "--url", url, "--admin-key", KEY, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        pytest.param(
            "bfloat16", marks=pytest.mark.skipif(not native.is_available(), reason="the native kernels are not built")
        ),
    ],
)
async def test_out_a_replica_and_in_again(dtype: str, checkpoint_factory: Callable[..., Path], tmp_path: Path) -> None:
    """In bfloat16 every token of every answer stays what it was; in float32, of the answers that are clear."""
    model = checkpoint_factory("qwen3_moe")
    kernels = "native" if dtype == "bfloat16" else "auto"
    with ChaosServer(tmp_path, str(model), *FLAGS, *QUIET, "--dtype", dtype, "--kernels", kernels) as server:
        load = make_load(60, 6, 40, 101)
        oracle = (await run(server, load)).answers
        if dtype == "float32":
            load, oracle = clear_requests(model, load, oracle)
        before = server.residue()

        wider = await under_traffic(
            server, load, oracle, lambda: server.admin("POST", "/admin/scale", {"expert_workers": 3})
        )
        assert num_serving(wider) == 3
        assert wider["missing"] == 0
        assert set(server.pids()) == {"attention 0", "expert 0", "expert 1", "expert 2"}

        layer, expert = server.hottest_expert()
        body = {"layer": layer, "expert": expert, "count": 2}
        replicated = await under_traffic(server, load, oracle, lambda: server.admin("POST", "/admin/replicas", body))
        assert replicated["num_replicas"] == 1

        # One dies while the others are told to do without it: it must neither hang nor lose anything.
        def shrink_and_kill() -> subprocess.CompletedProcess[str]:
            server.kill("expert 1")
            return amoe_scale(server, "--expert-workers", "1")

        done = await under_traffic(server, load, oracle, shrink_and_kill)
        assert done.returncode == 0, done.stdout + done.stderr
        assert num_serving(server.cluster()) == 1
        assert set(server.pids()) == {"attention 0", "expert 0"}
        assert server.leaks(before) == []

        with pytest.raises(urllib.error.HTTPError, match="400"):
            server.admin("POST", "/admin/scale", {"expert_workers": 4})

"""An engine on two hosts, as users start it there: Ray's head, the server and an attention worker here, and an expert
worker in another network namespace. The wire between is cut in the middle of streams, and made long."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from amoe.cluster.front import Front
from amoe.cluster.ray_cluster.session import NAMESPACE
from amoe.config import EngineConfig
from amoe.engine.generation import GenerationDelta
from amoe.types import SamplingParams
from tests.integration.exactness import Case, checkpoint
from tests.network import HERE, THERE, Network, two_hosts
from tests.ray_nodes import CPUS_PER_NODE, OTHER_TAKES, check, head_node, running

pytestmark = pytest.mark.cluster

NUM_STREAMS, NUM_TOKENS = 6, 120
DELAY_S = 0.05  # each way
CASES = {
    "tcp": Case("waves", 0, "qwen3_moe", "1A1E", "plain", 0),
    "distributed": Case("progress", 1, "olmoe", "1A1E", "plain", 1),
}


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with two_hosts() as network:
        yield network


@pytest.fixture(scope="module")
def address(network: Network) -> Iterator[str]:
    """Of a Ray cluster with a node on either host, to which this process stays connected."""
    with head_node(HERE) as cluster:
        node = ["start", f"--address={cluster.address}", f"--node-ip-address={THERE}", f"--num-cpus={CPUS_PER_NODE}"]
        command = [sys.executable, "-m", "ray.scripts.scripts", *node, f"--resources={json.dumps(OTHER_TAKES)}"]
        try:
            subprocess.run([*network.prefix, *command], check=True, capture_output=True, text=True, timeout=60)
            ray.init(cluster.address, namespace=NAMESPACE, logging_level="warning")
            yield cluster.address
        finally:
            ray.shutdown()
            network.kill_there()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("network")


def config_of(case: Case, transport: str, root: Path) -> EngineConfig:
    config = case.config(checkpoint(root, case.arch, case.variant))
    # A machine that is busy with other tests takes a healthy worker for lost otherwise.
    failure = replace(config.failure, timeout_s=4.0)
    return replace(config, transport=transport, max_model_len=NUM_TOKENS + 64, failure=failure)


def lives(front: Front) -> dict[int, tuple[str, int]]:
    """State and incarnation of each worker."""
    assert front.admin is not None
    return {worker.rank: (worker.state, worker.incarnation) for worker in front.admin.status().workers}


async def until(condition: Callable[[], bool], what: str) -> None:
    for _ in range(6000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"never: {what}")


class Streams:
    """Long ones, which begin and go on side by side."""

    def __init__(self, front: Front) -> None:
        params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
        prompts = [[5 + index, 6, 7] for index in range(NUM_STREAMS)]
        self.num_tokens = 0
        self._all = asyncio.gather(*(self._read(front.engine.generate(prompt, params)) for prompt in prompts))

    async def _read(self, deltas: AsyncIterator[GenerationDelta]) -> list[int]:
        tokens: list[int] = []
        async for delta in deltas:
            tokens += delta.token_ids
            self.num_tokens += len(delta.token_ids)
        return tokens

    async def are_under_way(self) -> None:
        await until(lambda: self.num_tokens >= 2 * NUM_STREAMS, "tokens come")
        assert self.num_tokens < NUM_STREAMS * NUM_TOKENS

    async def tokens(self) -> list[list[int]]:
        return await self._all


@pytest.mark.parametrize("transport", ["tcp", pytest.param("distributed", marks=pytest.mark.matrix)])
async def test_the_wire_is_cut_and_long(network: Network, address: str, root: Path, transport: str) -> None:
    """Nothing fails, and every token is the same."""
    case = CASES[transport]
    async with running(address, config_of(case, transport, root)) as (front, _):
        undisturbed = await Streams(front).tokens()
        streams = Streams(front)
        await streams.are_under_way()
        network.cut()
        try:
            await until(lambda: lives(front)[1] != ("serving", 0), "the worker beyond is taken for lost")
        finally:
            network.heal()
        assert await streams.tokens() == undisturbed
        await until(lambda: lives(front)[1][0] == "serving", "there is another one")
        assert lives(front)[0] == ("serving", 0)
        replaced = lives(front)
        network.delay(DELAY_S)
        try:
            await check(front, case, root)
        finally:
            network.delay(0)
        assert lives(front) == replaced, "who is far away is not taken for lost"

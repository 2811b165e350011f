"""The engine of amoe, workers in their own processes: `python -m benchmarks.peers.drivers.amoe_driver [FLAGS] MODEL`.

FLAGS are those of `amoe serve` that concern the engine. Tokens are noted where the server would get them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from amoe import __version__
from amoe.cluster.front import running_engine
from amoe.engine.async_engine import AsyncEngine
from amoe.engine.worker import HEARTBEAT_S
from amoe.errors import AmoeError
from amoe.server.engine_flags import add_engine_flags, engine_config
from amoe.server.placement_flags import settled
from amoe.types import SamplingParams
from benchmarks.peers.drivers.protocol import Arrivals, Line


async def _one(engine: AsyncEngine, prompt: Sequence[int], params: SamplingParams) -> list[float]:
    times: list[float] = []
    async for delta in engine.generate(prompt, params):
        now = time.monotonic()
        times.extend(now for _ in delta.token_ids)
    return times


async def generate(engine: AsyncEngine, prompts: list[list[int]], output_len: int) -> Arrivals:
    """[num_prompts][output_len] times."""
    params = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)
    return await asyncio.gather(*(_one(engine, prompt, params) for prompt in prompts))


async def expert_shares(engine: AsyncEngine) -> list[list[float]]:
    """[num_layers][num_experts] of each layer's pairs since the start."""
    await asyncio.sleep(2 * HEARTBEAT_S)  # statistics come with heartbeats
    stats = [np.asarray(s.expert_pairs, np.float64) for s in engine.metrics.workers.values() if s.expert_pairs]
    pairs = sum(stats, np.zeros((1, 1)))
    return (pairs / np.maximum(1.0, pairs.sum(axis=1, keepdims=True))).tolist()


async def _answer(line: Line, engine: AsyncEngine) -> None:
    loop = asyncio.get_running_loop()
    while text := await loop.run_in_executor(None, sys.stdin.readline):
        request: dict[str, Any] = json.loads(text)
        if "prompts" not in request:
            line.send({"expert_shares": await expert_shares(engine)})
            continue
        started_at = time.monotonic()
        arrivals = await generate(engine, request["prompts"], request["output_len"])
        line.send({"started_at": started_at, "arrivals": arrivals})


async def _run(line: Line, args: argparse.Namespace) -> None:
    args, where = settled(args)
    async with running_engine(engine_config(args)) as (engine, _):
        line.send({"ready": {"version": __version__, "host": where}})
        await _answer(line, engine)


def main() -> None:
    """Start the engine, then answer the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_engine_flags(parser)
    parser.set_defaults(enable_prefix_caching=False, seed=0)
    args = parser.parse_args()
    line = Line()
    try:
        asyncio.run(_run(line, args))
    except AmoeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

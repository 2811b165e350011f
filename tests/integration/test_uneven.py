"""A worker that is slower than the others ends up with less of the work, by itself, under traffic."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from amoe.builtin import builtin_model_path
from amoe.cluster.front import serving
from amoe.cluster.local import LocalCluster
from amoe.config import EngineConfig, PlacementConfig, SteeringConfig
from amoe.engine.tokenizer import Tokenizer
from amoe.types import SamplingParams

pytestmark = pytest.mark.cluster

PARAMS = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
SLOW = 2  # rank of the second expert worker, 4 times slower than the first

MOVED = {"placement": PlacementConfig(expert_workers=2), "steering": SteeringConfig(rebalance_interval_s=1.0)}
SHARED = {"placement": PlacementConfig(expert_workers=2, redundant_experts=32)}


@pytest.mark.parametrize(
    "how",
    [pytest.param(MOVED, id="experts-are-moved"), pytest.param(SHARED, id="replicas-share", marks=pytest.mark.matrix)],
)
async def test_a_slow_worker_gets_its_share(how: dict[str, Any]) -> None:
    """Emulated devices. A fifth of the pairs is what makes both take as long; it begins with half of them."""
    device = f"emulated:h100,slow=20,model=olmoe-1b-7b,straggler={SLOW}:4"
    config = EngineConfig(model=str(builtin_model_path()), device=device, **how)
    async with serving(LocalCluster(config), name="m", tokenizer=Tokenizer(config.model)) as front:
        workers, is_over = front.engine.metrics.workers, False

        async def stream() -> None:
            while not is_over:
                deltas = [delta async for delta in front.engine.generate([5, 6, 7, 8] * 16, PARAMS)]
                assert sum(len(delta.token_ids) for delta in deltas) == PARAMS.max_tokens

        def pairs() -> np.ndarray:
            """[2] that both have computed so far."""
            return np.array([np.sum(workers[rank].expert_pairs) if rank in workers else 0 for rank in (1, SLOW)])

        tasks = [asyncio.create_task(stream()) for _ in range(8)]
        share = 0.5
        while share > 0.35:
            before = pairs()
            await asyncio.sleep(4.0)  # they tell twice a second, each at its own time: over less it would be chance
            both = pairs() - before
            share = both[1] / both.sum() if both.sum() > 1000 else share
        is_over = True
        await asyncio.gather(*tasks)
        assert front.admin is not None and front.admin.status().missing == 0

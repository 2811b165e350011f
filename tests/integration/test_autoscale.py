"""Under load the number of expert workers follows the age of their queues."""

from __future__ import annotations

import asyncio

from amoe.builtin import builtin_model_path
from amoe.cluster.front import serving
from amoe.cluster.local import LocalCluster
from amoe.config import AutoscaleConfig, EngineConfig, PlacementConfig
from amoe.engine.tokenizer import Tokenizer
from amoe.types import SamplingParams

PARAMS = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)


async def test_tokens_that_wait_long_bring_another_worker() -> None:
    """Emulated devices: two homes keep one expert worker late. All requests are answered, also by who came last."""
    config = EngineConfig(
        model=str(builtin_model_path()),
        device="emulated:h100,slow=20",
        placement=PlacementConfig(attention_workers=2, expert_workers=1, max_expert_workers=2),
        autoscale=AutoscaleConfig(min_workers=1, max_workers=2, queue_age_s=1e-5),
    )
    async with serving(LocalCluster(config), name="m", tokenizer=Tokenizer(config.model)) as front:
        assert front.admin is not None
        count = 0

        async def ask() -> None:
            nonlocal count
            while front.admin.status().num_expert_workers < 2 or count < 60:
                deltas = [delta async for delta in front.engine.generate([5, 6, 7, 8] * 8, PARAMS)]
                assert sum(len(delta.token_ids) for delta in deltas) == 64
                count += 1

        await asyncio.gather(*(ask() for _ in range(48)))
        assert [worker.role for worker in front.admin.status().workers] == ["attention"] * 2 + ["experts"] * 2

"""The real engine on emulated devices: processes, queues, transport; only the kernels wait for the modelled time."""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path

import numpy as np

from amoe.bench.offline import OfflinePlan, Variant, measure
from amoe.bench.record import summarise
from amoe.bench.workload import RequestSpec
from amoe.builtin import builtin_model_path
from amoe.clock import MonotonicClock
from amoe.cluster.front import running_engine
from amoe.config import CacheConfig, EngineConfig, PlacementConfig, SchedulerConfig
from amoe.profiles.models import MODELS
from amoe.profiles.routing import log_normal_routing
from amoe.types import SamplingParams
from benchmarks.study.points import STALE_SEED
from benchmarks.study.task import Row, Task

SLOW = 100  # every modelled time is so much longer, and host time weighs so much less: many processes share two cores
OUTPUT_TOKENS = 6
VARIANTS = ("lockstep", "lockstep:2", "mtfs", "flfs", "defrag", "progress", "waves:1", "waves:2", "waves:3")
MODEL_OF = {8: "mixtral-8x7b-mqa-top1", 16: "mixtral-16x7b-mqa-top1"}


def run_engine(workers: int, variant: str, sequences: int) -> list[Row]:
    """σ = 1.25, replicas where another domain was hot. All sequences start together and generate as many tokens."""
    name = MODEL_OF[workers]
    stale = log_normal_routing(MODELS[name], 1.25, seed=STALE_SEED).popularity()
    with tempfile.TemporaryDirectory() as directory:
        loads = Path(directory) / "loads.json"
        loads.write_text(json.dumps(stale.tolist()))
        config = EngineConfig(
            model=str(builtin_model_path()),
            device=f"emulated:h100,slow={SLOW},sigma=1.25,seed=0,model={name}",
            max_model_len=64,
            max_waiting=sequences,
            placement=PlacementConfig(colocated=workers, redundant_experts=1, expert_load=str(loads)),
            scheduler=Variant.parse(variant).apply(
                SchedulerConfig(max_num_seqs=sequences // workers + 8, max_wait_s=60.0, max_hold_s=60.0)
            ),
            cache=CacheConfig(enable_prefix_caching=False),
        )
        return asyncio.run(_measure(config, workers, variant, sequences))


async def _measure(config: EngineConfig, workers: int, variant: str, sequences: int) -> list[Row]:
    rng = np.random.default_rng(0)
    specs = [
        RequestSpec(prompt=rng.integers(100, 200, size=4).tolist(), max_tokens=OUTPUT_TOKENS) for _ in range(sequences)
    ]
    plan = OfflinePlan(warmup=[], specs=specs, concurrency=sequences, params=SamplingParams(ignore_eos=True))
    async with running_engine(config) as (engine, _):
        result = await measure(engine, plan, MonotonicClock())
    figures = summarise(result.records)
    gaps = np.concatenate([np.diff(record.arrivals) for record in result.records]) / SLOW
    return [
        {
            "workers": workers,
            "system": variant,
            "sequences": sequences,
            "throughput": sequences / gaps.mean() / workers,
            "mean_itl_ms": gaps.mean() * 1e3,
            "tail": float(np.percentile(gaps, 99) / gaps.mean()),
            "failed": figures.failed,
        }
    ]


def tasks(per_worker: int) -> list[Task]:
    """8 and 16 workers."""
    few = ("lockstep", "progress", "waves:1", "waves:2")
    return [
        Task("engine", run_engine, (workers, variant, per_worker * workers))
        for workers, variants in ((8, VARIANTS), (16, few))
        for variant in variants
    ]

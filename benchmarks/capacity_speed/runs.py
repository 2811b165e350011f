"""What capacity is worth in time: the real engine on emulated devices under skew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from amoe.bench.offline import Variant
from amoe.builtin import builtin_model_path
from amoe.config import CacheConfig, CapacityConfig, EngineConfig, PlacementConfig, SchedulerConfig, SteeringConfig
from amoe.stats import WorkerStats
from benchmarks.emulated_run import run_emulated

WORKERS = 8
SIGMA = 1.25
TOKENS = 6
# Every modelled time is so much longer. Passes of the small model would be over before the server has told of them.
SLOW = {"mixtral-8x7b-mqa": 100.0, "olmoe-1b-7b": 500.0}


@dataclass(frozen=True)
class Setting:
    """One run: `capacity` are arguments of `CapacityConfig`, none: lossless."""

    model: str
    per_worker: int
    schedule: str
    label: str
    capacity: dict[str, Any]


FACTORS = (2.0, 1.5, 1.25, 1.0)
SLACKS_MS = (1.0, 0.25, 0.0)  # of modelled time


def settings() -> list[Setting]:
    """Mixtral with all of them, a fine-grained model with a few."""
    chosen = [
        Setting("mixtral-8x7b-mqa", 512, schedule, label, capacity)
        for schedule in ("lockstep", "progress", "waves:3")
        for label, capacity in _capacities(schedule)
    ]
    few: list[tuple[str, dict[str, Any]]] = [("lossless", {}), ("drop γ=1.5", {"factor": 1.5})]
    few.append(("drop γ=1", {"factor": 1.0}))
    chosen += [
        Setting("olmoe-1b-7b", 512, schedule, label, capacity)
        for schedule in ("lockstep", "waves:3")
        for label, capacity in few
    ]
    return chosen


def _capacities(schedule: str) -> list[tuple[str, dict[str, Any]]]:
    found: list[tuple[str, dict[str, Any]]] = [("lossless", {})]
    found += [(f"drop γ={factor:g}", {"factor": factor}) for factor in FACTORS]
    found.append(("reroute γ=1", {"factor": 1.0, "mode": "reroute"}))
    found.append(("drop γ=1 device", {"factor": 1.0, "scope": "device"}))
    if schedule != "lockstep":  # behind a barrier all queues are empty when it matters
        found += [(f"slack {ms:g} ms", {"slack_s": ms * 1e-3 * SLOW["mixtral-8x7b-mqa"]}) for ms in SLACKS_MS]
    return found


def run(setting: Setting) -> dict[str, Any]:
    """One row: static expert parallelism without replicas, as in the paper; capacity in both phases."""
    sequences, slow = setting.per_worker * WORKERS, SLOW[setting.model]
    capacity = {**setting.capacity, "phase": "both", "telemetry_s": 60.0} if setting.capacity else {}
    config = EngineConfig(
        model=str(builtin_model_path()),
        device=f"emulated:h100,slow={slow:g},sigma={SIGMA},seed=0,model={setting.model}",
        max_model_len=64,
        max_waiting=sequences,
        placement=PlacementConfig(colocated=WORKERS),
        scheduler=Variant.parse(setting.schedule).apply(
            SchedulerConfig(max_num_seqs=setting.per_worker + 8, max_wait_s=60.0, max_hold_s=60.0)
        ),
        cache=CacheConfig(enable_prefix_caching=False),
        steering=SteeringConfig(interval_s=0.0),
        capacity=CapacityConfig(**capacity),
    )
    figures, workers = run_emulated(config, sequences, TOKENS, slow)
    labels = {"model": setting.model, "schedule": setting.schedule, "capacity": setting.label}
    return {**labels, **figures, **_taken(workers)}


def _taken(workers: list[WorkerStats]) -> dict[str, float]:
    """Shares of the pairs, and of the gate mass, over all layers and workers."""
    pairs = sum(int(np.sum(worker.expert_pairs)) for worker in workers)
    snapshots = [worker.capacity for worker in workers if worker.capacity is not None]
    lost = np.array([row[2:] for snapshot in snapshots for row in snapshot.lost]).reshape(-1, 2).sum(axis=0)
    wanted = pairs + int(lost[0])
    tokens = sum(snapshot.tokens for snapshot in snapshots)
    return {
        "dropped": float(lost[0]) / max(1, wanted),
        "rerouted": float(lost[1]) / max(1, wanted),
        "mass_lost": sum(snapshot.gate_mass_lost for snapshot in snapshots) / max(1, tokens),
    }

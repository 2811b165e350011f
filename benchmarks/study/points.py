"""The points that the count-level parts of the study share: models, loads, placements."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from amoe.profiles.devices import DEVICES
from amoe.profiles.links import FABRICS
from amoe.profiles.models import MODELS, ModelSizes
from amoe.profiles.routing import log_normal_routing
from amoe.sim.flow.bound import bound
from amoe.sim.flow.deployment import Deployment, FloatArray
from amoe.sim.flow.systems import Case, System, simulate

STALE_SEED = 10_000  # the domain that a stale placement was made for
SPARE_MEMORY = 0.9  # of a device's memory for weights and KV


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One model with the devices and the slots that the study gives it."""

    model: str
    devices: int = 8
    slots: int
    device: str = "h100"
    context: int = 512


# Slots as in the study that this one checks itself against: an eighth of the experts more than needed, at least one.
SETTINGS = {
    "Mixtral top-1": Setting(model="mixtral-8x7b-mqa-top1", slots=2),
    "Mixtral top-2": Setting(model="mixtral-8x7b-mqa", slots=2),
    "Qwen3-30B-A3B": Setting(model="qwen3-30b-a3b", slots=18),
    "gpt-oss-120b": Setting(model="gpt-oss-120b", slots=18),
    "DeepSeek-V3": Setting(model="deepseek-v3", slots=9, devices=32),
}
LOADS = {"low": 64, "medium": 256, "high": 1024, "saturated": 2048}  # sequences per device, if they fit


@lru_cache(maxsize=64)  # a quarter of a point's time, and all loads of a model share it
def popularity(model: str, sigma: float, seed: int, *, correlated: bool = False) -> FloatArray:
    """[L, E] of log-normal routing."""
    return log_normal_routing(MODELS[model], sigma, seed, correlated=correlated).popularity()


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point: everything that decides it, picklable."""

    setting: Setting
    sequences: int
    sigma: float
    stale: bool = False
    seed: int = 0
    correlated: bool = False
    slow: dict[int, float] = field(default_factory=dict)

    def case(self) -> Case:
        """What the simulator takes."""
        setting = self.setting
        sizes = MODELS[setting.model]
        deployment = Deployment(
            sizes=sizes,
            device=DEVICES[setting.device],
            fabric=FABRICS[setting.device],
            num_devices=setting.devices,
            num_sequences=self.sequences,
            context=setting.context,
            slow=self.slow,
        )
        now = popularity(setting.model, self.sigma, self.seed, correlated=self.correlated)
        old = popularity(setting.model, self.sigma, self.seed + STALE_SEED) if self.stale else now
        return Case(deployment=deployment, popularity=now, believed=old, slots=setting.slots)


def most_sequences(sizes: ModelSizes, setting: Setting) -> int:
    """Sequences per device whose KV fits beside weights and replicas."""
    device = DEVICES[setting.device]
    weights = sizes.attention_bytes + sizes.num_sparse_layers * setting.slots * sizes.expert_bytes
    per_sequence = sizes.num_layers * setting.context * sizes.kv_bytes
    return int((device.memory_bytes * SPARE_MEMORY - weights) / per_sequence)


def load_of(setting: Setting, name: str) -> int:
    """Sequences of all devices together at a named load: what fits at most where that is less."""
    return min(LOADS[name], most_sequences(MODELS[setting.model], setting)) * setting.devices


def loads_of(setting: Setting) -> list[str]:
    """Named loads that differ: where memory is full at `high` already, that is `saturated`."""
    different = {load_of(setting, name): name for name in LOADS}
    return list(different.values())


def measure(point: Point, systems: tuple[System, ...], labels: dict[str, Any], iterations: int = 8) -> list[dict]:
    """Rows of one point: each system's figures, and the bound."""
    case = point.case()
    limit = bound(case.deployment, case.popularity, case.owners("anchored"))
    most = limit.throughput(case.deployment)
    placed = limit.placed_throughput(case.deployment) if limit.placement_s > limit.seconds else most
    rows = []
    for system in systems:
        result = simulate(system, case, seed=point.seed, num_iterations=iterations)
        rows.append(
            {
                **labels,
                "sequences": point.sequences,
                "seed": point.seed,
                "system": system.name,
                "throughput": result.throughput,
                "mean_itl_ms": result.mean_itl * 1e3,
                "p99_itl_ms": result.p99_itl * 1e3,
                "tail": result.tail,
                "busy": result.busy,
                "waves": result.num_waves,
                "of_bound": result.throughput / most,
                "of_placed_bound": result.throughput / placed,
            }
        )
    return rows

"""All that a simulation depends on: frozen, keyword-only, validated. Every mistake is a `ConfigError`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from amoe.config import (
    BLOCK_SCHEDULES,
    CacheConfig,
    CapacityConfig,
    EngineConfig,
    PlacementConfig,
    SchedulerConfig,
    SteeringConfig,
)
from amoe.core.worker import ModelShape
from amoe.errors import ConfigError
from amoe.profiles.devices import DeviceProfile
from amoe.profiles.links import Fabric
from amoe.profiles.models import ModelSizes
from amoe.profiles.routing import RoutingModel
from amoe.sim.workload import Workload
from amoe.types import Int16Array

HostMode = Literal["serial", "prelaunched", "queued"]
WindowUnit = Literal["seconds", "iterations"]


@dataclass(frozen=True, kw_only=True, slots=True)
class HostModel:
    """What the host costs.

    Attributes:
        seconds: of host time per step.
        mode: `serial`: the device waits for the host before every step. `prelaunched`: the host makes the next step
            ready while the device is busy with the one before, so that only what does not fit is seen; after an idle
            spell all of it is. `queued`: the next step is on the device before its data arrives and waits there
            (device-side waiting), so that idle spells hide host time as well. In all modes the step is chosen when it
            could begin; a host that really is ahead chooses earlier and knows less, so the last two are optimistic.
    """

    seconds: float = 0.0
    mode: HostMode = "serial"

    def __post_init__(self) -> None:
        if self.seconds < 0 or not math.isfinite(self.seconds):
            raise ConfigError(f"host time must be a finite number of seconds of at least 0, not {self.seconds}")
        if self.mode not in get_args(HostMode):
            raise ConfigError(f"host time is {', '.join(get_args(HostMode))}, not {self.mode!r}")

    def visible(self, now: float, last_begin: float, last_end: float) -> float:
        """Seconds that a step chosen at `now` waits for the host; the one before ran in [last_begin, last_end]."""
        if self.mode == "serial" or (self.mode == "prelaunched" and now > last_end):
            return self.seconds
        return max(0.0, self.seconds - (now - last_begin))


@dataclass(frozen=True, kw_only=True, slots=True)
class Slowdown:
    """From `at_s` on, the device of worker `rank` is `factor` times slower than its profile. The latest one holds."""

    rank: int
    factor: float
    at_s: float = 0.0

    def __post_init__(self) -> None:
        if not (self.factor > 0 and math.isfinite(self.factor)) or self.at_s < 0:
            raise ConfigError("a slowdown needs a factor greater than 0 and a time of at least 0 seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outage:
    """Worker `rank` does nothing from `start_s` to `end_s` (by default for ever). What is sent to it waits."""

    rank: int
    start_s: float
    end_s: float = math.inf

    def __post_init__(self) -> None:
        if not 0 <= self.start_s < self.end_s:
            raise ConfigError("an outage must begin at 0 seconds or later, and end after that")


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """What is measured: `length` after `warmup`, or up to the end of the last request.

    Attributes:
        unit: seconds; or `iterations` of a closed loop, one of which is as many output tokens as there are sequences.
    """

    length: float = math.inf
    warmup: float = 0.0
    unit: WindowUnit = "seconds"

    def __post_init__(self) -> None:
        if not self.length > 0 or not 0 <= self.warmup < math.inf:
            raise ConfigError("a measurement needs a length greater than 0 and a finite warm-up of at least 0")
        if self.unit not in get_args(WindowUnit):
            raise ConfigError(f"a measurement is in {' or '.join(get_args(WindowUnit))}, not {self.unit!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SimConfig:
    """One simulation.

    Attributes:
        device: of every worker, but for `slowdowns`.
        scheduler: its schedule `auto` comes to `waves` here: what is simulated is blocks.
        cache: `num_blocks` and `kv_cache_bytes` as in the engine; None: what the device's memory leaves room for.
        routing: experts of the tokens.
        owners: [num_layers, num_experts, R] where experts and their replicas live, as `amoe.policy.placement` makes
            them; None: no replicas.
        shares: [num_layers, num_experts, R] of the pairs that each replica gets; None: all at the primaries.
        steering: nothing plans here, so the shares stay; an interval above 0 lets homes relieve workers that are late.
        max_model_len: None: the longest sequence of the workload.
        seed: of everything that is drawn.
    """

    sizes: ModelSizes
    device: DeviceProfile
    routing: RoutingModel
    workload: Workload
    window: Window = Window()
    fabric: Fabric = field(default_factory=Fabric)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    cache: CacheConfig = field(default_factory=lambda: CacheConfig(enable_prefix_caching=False))
    capacity: CapacityConfig = field(default_factory=CapacityConfig)
    host: HostModel = HostModel()
    slowdowns: tuple[Slowdown, ...] = ()
    outages: tuple[Outage, ...] = ()
    owners: Int16Array | None = None
    shares: npt.NDArray[np.float64] | None = None
    steering: SteeringConfig = field(default_factory=lambda: SteeringConfig(interval_s=0.0))
    max_model_len: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scheduler.schedule == "auto":
            object.__setattr__(self, "scheduler", replace(self.scheduler, schedule="waves"))
        if self.scheduler.schedule not in BLOCK_SCHEDULES:
            raise ConfigError(
                f"the schedule {self.scheduler.schedule} cannot be simulated; known: {', '.join(BLOCK_SCHEDULES)}"
            )
        num_workers = self.placement.num_workers
        for rank in [item.rank for item in self.slowdowns] + [item.rank for item in self.outages]:
            if not 0 <= rank < num_workers:
                raise ConfigError(f"there is no worker {rank}: ranks go from 0 to {num_workers - 1}")
        if self.longest_sequence < self.workload.max_model_len:
            raise ConfigError(
                f"the workload has sequences of up to {self.workload.max_model_len} tokens, "
                f"but max_model_len is {self.max_model_len}"
            )
        if self.window.unit == "iterations" and self.workload.concurrency is None:
            raise ConfigError("only a closed loop has iterations to measure: give a duration in seconds")
        if math.isinf(self.window.length) and self.workload.num_requests is None:
            raise ConfigError("a workload without end needs a length of the measurement")
        if self.placement.redundant_experts and self.owners is None:
            raise ConfigError("a simulation with redundant experts needs their owners")
        if self.shares is not None and (self.owners is None or self.shares.shape != self.owners.shape):
            raise ConfigError("shares need owners of the same shape")
        if len(self.placement.expert_ranks) > self.sizes.num_experts:
            raise ConfigError(f"more expert workers than the {self.sizes.num_experts} experts of {self.sizes.name}")

    @property
    def longest_sequence(self) -> int:
        """Tokens of prompt and answer at most."""
        return self.workload.max_model_len if self.max_model_len is None else self.max_model_len

    @property
    def shape(self) -> ModelShape:
        """What the core has to know of the model."""
        return ModelShape(self.sizes.sparse_layers, self.sizes.num_experts)

    def engine_config(self) -> EngineConfig:
        """What the core has to know of everything else."""
        return EngineConfig(
            model=self.sizes.name,
            max_model_len=self.longest_sequence,
            seed=self.seed,
            placement=self.placement,
            scheduler=self.scheduler,
            cache=self.cache,
            capacity=self.capacity,
            steering=self.steering,
        )

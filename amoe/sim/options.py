"""What the words of `amoe simulate` stand for: models, devices, routing, lengths, faults."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from amoe.config import BLOCK_SCHEDULES, SchedulerConfig
from amoe.errors import ConfigError
from amoe.models.config import load_model_config
from amoe.profiles.checkpoints import checkpoint_sizes
from amoe.profiles.costs import BlockCosts
from amoe.profiles.devices import DEVICES, DeviceProfile
from amoe.profiles.links import FABRICS, Fabric
from amoe.profiles.measured import MeasuredCosts, ScaledCosts, is_measured, load_measured
from amoe.profiles.models import MODELS, ModelSizes
from amoe.profiles.routing import RecordedRouting, RoutingModel, log_normal_routing, published_routing
from amoe.sim.config import Outage, Slowdown
from amoe.sim.routing import PooledRouting
from amoe.sim.timing import ROOFLINE, CostModel

ROUTING_HELP = "uniform, sigma=S (log-normal weights), published:NAME, or a .npy file of recorded topk_ids [T, L, K]"


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Devices, and what blocks cost on them. `measured`: sizes of the model that a measured profile was made with."""

    device: DeviceProfile
    cost_model: CostModel
    measured: ModelSizes | None = None

    def sizes_for(self, sizes: ModelSizes) -> ModelSizes:
        """`sizes`, or what was measured if that is the same model.

        Raises:
            ConfigError: another model was measured.
        """
        if self.measured is None:
            return sizes
        for name in ("num_layers", "hidden_size", "num_experts", "top_k"):
            mine, theirs = getattr(sizes, name), getattr(self.measured, name)
            if mine != theirs:
                raise ConfigError(
                    f"{self.device.name} was measured with another model: {name} {theirs}, and {sizes.name} has {mine}"
                )
        return self.measured


def find_sizes(name: str) -> ModelSizes:
    """Sizes of a named model, or of a checkpoint in a directory.

    Raises:
        ConfigError, CheckpointError: there is neither, or it cannot be simulated.
    """
    if name in MODELS:
        return MODELS[name]
    if not Path(name).is_dir():
        raise ConfigError(f"{name!r} is no checkpoint directory, nor one of {', '.join(MODELS)}")
    return checkpoint_sizes(load_model_config(name))


def find_hardware(name: str, *, include_host: bool) -> Hardware:
    """A named device, or a measured profile (`*.json`), whose memory is taken to be without end.

    Args:
        include_host: add a measured profile's host time to its kernels.

    Raises:
        ConfigError: there is neither.
    """
    if not is_measured(name):
        if name not in DEVICES:
            raise ConfigError(
                f"there is no device profile {name!r}; known: {', '.join(DEVICES)}, or a measured profile (*.json)"
            )
        return Hardware(device=DEVICES[name], cost_model=ROOFLINE)
    if not Path(name).is_file():
        raise ConfigError(f"there is no measured profile {name!r}")
    measured = load_measured(name)
    costs = measured.with_host() if include_host else measured
    device = DeviceProfile(name=name, peak_flops=1.0, memory_bandwidth=1.0, memory_bytes=math.inf)
    return Hardware(device=device, cost_model=_measured_model(costs), measured=measured.sizes)


def _measured_model(costs: MeasuredCosts) -> CostModel:
    def make(sizes: ModelSizes, device: DeviceProfile) -> BlockCosts:
        return costs if device.slowdown == 1.0 else ScaledCosts(costs, device.slowdown)

    return make


def find_fabric(
    device: str, name: str | None, devices_per_node: int, latency_us: float | None, gigabytes_per_s: float | None
) -> Fabric:
    """Links between the devices: those of `name`, by default of the device's kind, with changes inside a node.

    Raises:
        ConfigError: there are none of that name.
    """
    if name is not None and name not in FABRICS:
        raise ConfigError(f"there is no fabric {name!r}; known: {', '.join(FABRICS)}")
    fabric = FABRICS.get(name or device, FABRICS["h100"])
    intra = fabric.intra
    if latency_us is not None:
        intra = replace(intra, latency_s=latency_us * 1e-6)
    if gigabytes_per_s is not None:
        intra = replace(intra, bandwidth=gigabytes_per_s * 1e9)
    return replace(fabric, devices_per_node=devices_per_node, intra=intra)


def find_routing(text: str, sizes: ModelSizes, seed: int) -> RoutingModel:
    """The routing model that `text` names, see `ROUTING_HELP`.

    Raises:
        ConfigError: it names none, or one that the model cannot have.
    """
    kind, _, value = text.partition("=")
    if text == "uniform" or kind == "sigma":
        sigma = 0.0 if text == "uniform" else _number(value, f"--routing {text}")
        return PooledRouting(log_normal_routing(sizes, sigma, seed), seed)
    if text.startswith("published:"):
        return PooledRouting(published_routing(sizes, text.removeprefix("published:"), seed), seed)
    path = Path(text)
    if not path.is_file():
        raise ConfigError(f"--routing {text}: no such file; write {ROUTING_HELP}")
    return _recorded_routing(path, sizes)


def _recorded_routing(path: Path, sizes: ModelSizes) -> RecordedRouting:
    try:
        topk_ids = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ConfigError(f"--routing {path}: not a .npy file: {error}") from None
    if not isinstance(topk_ids, np.ndarray) or not np.issubdtype(topk_ids.dtype, np.integer):
        raise ConfigError(f"--routing {path}: not an array of integers")
    if topk_ids.ndim != 3 or topk_ids.shape[1:] != (sizes.num_layers, sizes.top_k):
        raise ConfigError(
            f"--routing {path}: the shape is {list(topk_ids.shape)}, and {sizes.name} needs "
            f"[tokens, {sizes.num_layers}, {sizes.top_k}]"
        )
    return RecordedRouting(topk_ids, sizes.num_experts)


def find_schedule(text: str, base: SchedulerConfig) -> SchedulerConfig:
    """`progress`, `waves`, `waves:4` (waves) or `lockstep:2` (micro-batches), with the rest of `base`.

    Raises:
        ConfigError: there is no such schedule.
    """
    name, _, number = text.partition(":")
    if name not in BLOCK_SCHEDULES:
        raise ConfigError(f"--schedule {text}: there is none of that name; known: {', '.join(BLOCK_SCHEDULES)}")
    values = {"schedule": name}
    if not number:
        return replace(base, **values)  # type: ignore[arg-type]
    if name not in ("waves", "lockstep") or not number.isdigit():
        raise ConfigError(f"--schedule {text}: only waves:N and lockstep:N have a number")
    key = "num_waves" if name == "waves" else "micro_batches"
    return replace(base, **values, **{key: int(number)})  # type: ignore[arg-type]


def find_slowdown(text: str) -> Slowdown:
    """`RANK:FACTOR` or `RANK:FACTOR@SECONDS`.

    Raises:
        ConfigError: it is something else.
    """
    rank, _, rest = text.partition(":")
    factor, at, when = rest.partition("@")
    where = f"--slow {text}"
    return Slowdown(rank=_rank(rank, where), factor=_number(factor, where), at_s=_number(when, where) if at else 0.0)


def find_outage(text: str) -> Outage:
    """`RANK@START` (it dies) or `RANK@START-END`, in seconds.

    Raises:
        ConfigError: it is something else.
    """
    rank, _, rest = text.partition("@")
    start, dash, end = rest.partition("-")
    where = f"--stop {text}"
    end_s = _number(end, where) if dash else math.inf
    return Outage(rank=_rank(rank, where), start_s=_number(start, where), end_s=end_s)


def _rank(text: str, where: str) -> int:
    if not text.isdigit():
        raise ConfigError(f"{where}: {text!r} is not the rank of a worker")
    return int(text)


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"{where}: {text!r} is not a number") from None
    if not math.isfinite(value):
        raise ConfigError(f"{where}: {text} is not a finite number")
    return value

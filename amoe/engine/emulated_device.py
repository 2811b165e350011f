"""The device string of emulation, and what it stands for: sizes of a model, costs of its blocks, room for a KV cache.

    emulated:PROFILE[,slow=F][,sigma=S][,seed=N][,model=NAME][,straggler=RANK:F]...

PROFILE is a name in `amoe.profiles.devices.DEVICES`, or the path of a measured profile (`*.json`). A worker on an
emulated device is a real one in all but its kernels, which are waits for the modelled time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from amoe.config import EngineConfig
from amoe.engine.kv_plan import KVPlan
from amoe.errors import ConfigError
from amoe.models.config import ModelConfig, load_model_config
from amoe.profiles.checkpoints import checkpoint_sizes
from amoe.profiles.context import ContextCounter
from amoe.profiles.costs import BlockCosts, RooflineCosts
from amoe.profiles.devices import DEVICES, DeviceProfile, device_profile
from amoe.profiles.measured import ScaledCosts, is_measured, load_measured
from amoe.profiles.models import ModelSizes, model_sizes
from amoe.profiles.routing import RoutingModel, log_normal_routing

PREFIX = "emulated:"
GRAMMAR = "emulated:PROFILE[,slow=F][,sigma=S][,seed=N][,model=NAME][,straggler=RANK:F]"
MEMORY_SHARE = 0.9  # of the device, for weights and KV cache: the rest is the runtime's
MAX_KV_BLOCKS = 1 << 20  # the core keeps tables of them
MAX_MODEL_LEN = 1 << 20

# Of whom only the ratio counts: some ten operations for every byte, as processors have.
CPU_LIKE = DeviceProfile(name="cpu", peak_flops=4e11, memory_bandwidth=4e10, memory_bytes=1.0)

T = TypeVar("T")
Shape = ModelConfig | ModelSizes  # both know num_layers, num_experts, hidden_size, top_k and sparse_layers


@dataclass(frozen=True, kw_only=True, slots=True)
class EmulatedDevice:
    """A device string, understood.

    Attributes:
        profile: name of a device, or path of a measured profile.
        slow: every modelled time is multiplied by it, so that a small machine's own overhead weighs less.
        sigma: of the log-normal expert weights; 0 is uniform routing.
        seed: of those weights, and of what each worker draws.
        model: named sizes in place of the checkpoint's.
        stragglers: (rank, factor): workers that are slower than the others.
    """

    profile: str
    slow: float = 1.0
    sigma: float = 0.0
    seed: int = 0
    model: str | None = None
    stragglers: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        for name, factor in (("slow", self.slow), *((f"straggler={rank}", factor) for rank, factor in self.stragglers)):
            _require(0 < factor < math.inf, f"{name}: the factor must be greater than 0 and finite, not {factor:g}")
        _require(0 <= self.sigma < math.inf, f"sigma must be at least 0 and finite, not {self.sigma:g}")
        _require(self.seed >= 0, f"seed must be at least 0, not {self.seed}")
        ranks = [rank for rank, _ in self.stragglers]
        _require(len(set(ranks)) == len(ranks), "straggler names a rank twice")
        if is_measured(self.profile):
            _require(self.model is None, "a measured profile is of one model: leave out model=")
            _require(Path(self.profile).is_file(), f"there is no measured profile {self.profile!r}")
        else:
            known = f"known: {', '.join(DEVICES)}, or the path of a measured profile (*.json)"
            _require(self.profile in DEVICES, f"there is no device profile {self.profile!r}; {known}")
        if self.model is not None:
            model_sizes(self.model)

    @classmethod
    def parse(cls, text: str) -> EmulatedDevice:
        """`text` is the whole device string, prefix included.

        Raises:
            ConfigError: it says nothing that can be emulated; the message says what would.
        """
        profile, *options = text.removeprefix(PREFIX).split(",")
        fields: dict[str, Any] = {}
        stragglers: list[tuple[int, float]] = []
        for option in options:
            key, _, value = option.partition("=")
            if key == "straggler":
                rank, _, factor = value.partition(":")
                stragglers.append((_number(int, key, rank, option), _number(float, key, factor, option)))
            elif key in _OPTIONS and key not in fields:
                fields[key] = _number(_OPTIONS[key], key, value, option)
            else:
                raise ConfigError(f"--device {text}: {option!r} is unknown or there twice; write {GRAMMAR}")
        try:
            return cls(profile=profile, stragglers=tuple(stragglers), **fields)
        except ConfigError as error:
            raise ConfigError(f"--device {text}: {error}") from error

    # ---- what it stands for

    def sizes(self, checkpoint: ModelConfig) -> ModelSizes:
        """Sizes of the model that is emulated.

        Raises:
            ConfigError: the checkpoint's cannot be emulated.
        """
        if self.model is not None:
            return model_sizes(self.model)
        if is_measured(self.profile):
            return load_measured(self.profile).sizes
        return checkpoint_sizes(checkpoint)

    def costs(self, sizes: ModelSizes, rank: int) -> BlockCosts:
        """Seconds that the worker `rank` waits."""
        costs: BlockCosts
        if is_measured(self.profile):
            costs = load_measured(self.profile)
        else:
            costs = RooflineCosts(sizes, device_profile(self.profile))
        factor = self.slow * dict(self.stragglers).get(rank, 1.0)
        return costs if factor == 1.0 else ScaledCosts(costs, factor)

    def context(self, sizes: ModelSizes) -> ContextCounter:
        """What a prefill chunk pays for: by the device's ratio of computing and reading, whatever it is slowed by."""
        return ContextCounter(sizes, CPU_LIKE if is_measured(self.profile) else device_profile(self.profile))

    def routing(self, sizes: ModelSizes) -> RoutingModel:
        """Where tokens go: the same at all workers."""
        return log_normal_routing(sizes, self.sigma, self.seed)

    def memory_bytes(self) -> float:
        """Of one device; infinite where it is not known."""
        return math.inf if is_measured(self.profile) else device_profile(self.profile).memory_bytes

    def describe(self, sizes: ModelSizes) -> str:
        """What is emulated, for the log."""
        text = f"emulating {self.profile}, model {sizes.name}, routing of sigma {self.sigma:g}: tokens are made up"
        if self.slow != 1.0:
            text += f"; modelled times are multiplied by {self.slow:g}, and so are all times that are reported"
        for rank, factor in self.stragglers:
            text += f"; worker {rank} is {factor:g} times slower than the others"
        return text


_OPTIONS: dict[str, Callable[[str], Any]] = {"slow": float, "sigma": float, "seed": int, "model": str}


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _number(convert: Callable[[str], T], key: str, value: str, option: str) -> T:
    try:
        return convert(value)
    except ValueError as error:
        wanted = "RANK:FACTOR" if key == "straggler" else "a whole number" if convert is int else "a number"
        raise ConfigError(f"--device: {option!r} needs {wanted} behind {key}=; write {GRAMMAR}") from error


def emulated_device(config: EngineConfig) -> EmulatedDevice | None:
    """What `config.device` emulates; None: it is a real one.

    Raises:
        ConfigError: it cannot be emulated.
    """
    if not config.device.startswith(PREFIX) and config.device != PREFIX[:-1]:
        return None
    device = EmulatedDevice.parse(config.device)
    for rank, _ in device.stragglers:
        if not 0 <= rank < config.placement.num_workers:
            raise ConfigError(f"--device {config.device}: there is no worker {rank} to be a straggler")
    return device


def served_shape(config: EngineConfig) -> Shape:
    """Sizes of what the workers serve: the checkpoint's, or those that stand in for it."""
    checkpoint = load_model_config(config.model)
    device = emulated_device(config)
    return checkpoint if device is None else device.sizes(checkpoint)


def emulated_length(config: EngineConfig, checkpoint: ModelConfig) -> int:
    """Tokens of a sequence at most: what the user says, since nothing has been trained for less.

    Raises:
        ConfigError: more than tables can be made for.
    """
    longest = config.max_model_len or checkpoint.max_position_embeddings
    if longest > MAX_MODEL_LEN:
        raise ConfigError(f"--max-model-len {longest} is too much: {MAX_MODEL_LEN} at most")
    return longest


def plan_emulated_kv(
    config: EngineConfig, device: EmulatedDevice, sizes: ModelSizes, longest: int, weight_bytes: float
) -> KVPlan:
    """As `plan_kv_cache`, but from the memory of the emulated device.

    Args:
        weight_bytes: of the blocks that the worker holds.

    Raises:
        ConfigError: weights or a sequence of the length asked for do not fit.
    """
    block_size, cache = config.cache.block_size, config.cache
    block_bytes = sizes.kv_bytes * sizes.num_layers * block_size
    useful = min(MAX_KV_BLOCKS, config.scheduler.max_num_seqs * -(-longest // block_size))
    room = device.memory_bytes() * MEMORY_SHARE - weight_bytes
    if room <= 0:
        raise ConfigError(
            f"the weights of a worker take {weight_bytes / 1e9:.1f} GB, and {MEMORY_SHARE:.0%} of an emulated "
            f"{device.profile} is {device.memory_bytes() * MEMORY_SHARE / 1e9:.1f} GB: use more workers"
        )
    budget = cache.kv_cache_bytes or room
    num_blocks = cache.num_blocks or int(min(budget / block_bytes, useful))  # `/`: may be infinite
    capacity = num_blocks * block_size
    if capacity < 2 or (capacity < longest and config.max_model_len is not None):
        raise ConfigError(
            f"the KV cache of an emulated worker holds {capacity} tokens, but a sequence may have {longest}: lower "
            "--max-model-len, raise --num-kv-blocks or --kv-cache-memory-bytes, or use more workers"
        )
    return KVPlan(num_blocks, min(longest, capacity))

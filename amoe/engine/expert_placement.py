"""Where experts and their replicas live, from the configuration and from loads that an earlier run has measured."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from amoe.config import EngineConfig, PlacementConfig
from amoe.engine.emulated_device import Shape
from amoe.errors import ConfigError
from amoe.policy.placement import place_experts, replicate_experts
from amoe.types import Int16Array

Float64Array = npt.NDArray[np.float64]


def expert_owners(config: EngineConfig, shape: Shape) -> Int16Array:
    """[num_layers, num_experts, R] owners of every expert's replicas, the primary first; -1: no replica.

    Every process that needs it computes it anew: the same configuration and the same file give the same owners.

    Raises:
        ConfigError: the workers cannot hold the experts, or no more of them, or the file of loads is none of this
            model.
    """
    placement, num_layers, num_experts = config.placement, shape.num_layers, shape.num_experts
    num_owners = len(placement.expert_ranks)
    if not placement.redundant_experts:
        return place_experts(num_layers, num_experts, num_owners)
    _check_redundant(placement, num_experts)
    load = np.ones((num_layers, num_experts))
    if placement.expert_load is not None:
        load = read_expert_load(placement.expert_load, num_layers, num_experts)
    slots = -(-num_experts // num_owners) + placement.redundant_experts
    return replicate_experts(load, num_owners, slots)


def _check_redundant(placement: PlacementConfig, num_experts: int) -> None:
    """Nobody holds an expert twice: of as many workers as there may be, each has room for those that it has not."""
    num_owners = len(placement.owner_ranks)
    share = num_experts // num_owners
    if placement.redundant_experts > num_experts - share:
        raise ConfigError(
            f"--redundant-experts {placement.redundant_experts} is too much: of the model's {num_experts} experts per "
            f"layer each of {num_owners} expert workers holds {share} anyway, and can hold {num_experts - share} more "
            "at most"
        )


def placement_digest(owners: Int16Array) -> int:
    """Differs where placements do: a home with another one would send tokens where nobody knows their experts."""
    return zlib.crc32(np.ascontiguousarray(owners).tobytes(), owners.shape[-1])


def read_expert_load(path: str, num_layers: int, num_experts: int) -> Float64Array:
    """[num_layers, num_experts] loads out of a JSON file: a list of a list of numbers for each layer.

    Raises:
        ConfigError: there is no such file, or it holds something else; it names the flag.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise ConfigError(f"--expert-load {path} cannot be read: {reason}") from error
    try:
        load = np.asarray(content, np.float64)
    except (TypeError, ValueError):
        load = np.empty(0)  # rows of different lengths, or no numbers
    if load.shape != (num_layers, num_experts):
        raise ConfigError(
            f"--expert-load {path} must hold {num_layers} lists, one per layer of this model, of {num_experts} numbers "
            "each, one per expert: let `amoe bench offline --save-expert-load` write it"
        )
    if not np.isfinite(load).all() or (load < 0).any():
        raise ConfigError(f"--expert-load {path} must hold finite numbers of at least 0")
    unknown = load.sum(axis=1) == 0  # dense layers, and what nobody has measured
    return np.where(unknown[:, None], 1.0, load)


def write_expert_load(path: Path, pairs: npt.NDArray[np.float64]) -> None:
    """Write loads [num_layers, num_experts], for `read_expert_load`."""
    rows = ",\n ".join(json.dumps([int(count) for count in row]) for row in pairs)
    path.write_text(f"[{rows}]\n", encoding="utf-8")

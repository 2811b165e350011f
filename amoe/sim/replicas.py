"""Replicas for a simulation: where they are, by loads, and which shares they have."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from amoe.errors import ConfigError
from amoe.policy.placement import replicate_experts
from amoe.policy.replicas import even_shares, plan_shares, primary_shares
from amoe.profiles.models import ModelSizes
from amoe.sim.config import SimConfig
from amoe.types import Int16Array

FloatArray = npt.NDArray[np.float64]
ShareMode = Literal["primary", "even", "planned"]
DEFAULT_WAVES = 2  # to plan shares for, where the engine chooses the number while it runs


def read_loads(path: Path, sizes: ModelSizes) -> FloatArray:
    """[L, E] loads from a JSON file, a list of numbers per layer, as `amoe bench offline --save-expert-load` writes it.

    Raises:
        ConfigError: the file is none of this model.
    """
    try:
        loads = np.asarray(json.loads(path.read_text(encoding="utf-8")), np.float64)
    except OSError as error:
        raise ConfigError(f"--expert-load {path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError):  # not JSON, rows of different lengths, or no numbers
        loads = np.empty(0)
    if loads.shape != (sizes.num_layers, sizes.num_experts) or not np.isfinite(loads).all() or (loads < 0).any():
        raise ConfigError(
            f"--expert-load {path} must hold {sizes.num_layers} lists, one per layer, of {sizes.num_experts} numbers"
        )
    return np.where(loads.any(axis=1, keepdims=True), loads, 1.0)


def with_replicas(config: SimConfig, num_redundant: int, loads: FloatArray, mode: ShareMode) -> SimConfig:
    """The same simulation with `num_redundant` more experts of each layer at every expert worker.

    Args:
        loads: [L, E] by which replicas are placed, and shares planned.
        mode: `primary`: they sleep; `even`: all replicas of an expert get the same; `planned`: so that no worker has
            more to do in a layer than it must, for batches of a closed loop.

    Raises:
        ConfigError: shares are to be planned, and nobody knows how large batches will be.
    """
    num_owners = len(config.placement.expert_ranks)
    slots = -(-config.sizes.num_experts // num_owners) + num_redundant
    owners = replicate_experts(loads, num_owners, slots)
    shares = {"primary": primary_shares, "even": even_shares}.get(mode, lambda _: _planned(config, loads, owners))(
        owners
    )
    return replace(config, owners=owners, shares=shares)


def _planned(config: SimConfig, loads: FloatArray, owners: Int16Array) -> FloatArray:
    concurrency = config.workload.concurrency
    if concurrency is None:
        raise ConfigError("shares can be planned for a closed loop only: choose primary or even")
    sizes, device = config.sizes, config.device
    scheduler = config.scheduler
    num_waves = (scheduler.num_waves or DEFAULT_WAVES) if scheduler.schedule == "waves" else scheduler.micro_batches
    batch = loads / loads.sum(axis=1, keepdims=True) * (sizes.top_k * concurrency / num_waves)
    per_token, reading = 2 * sizes.expert_params / device.flops, sizes.expert_bytes / device.bandwidth
    speed = np.ones(len(config.placement.expert_ranks))
    for slowdown in sorted(config.slowdowns, key=lambda item: item.at_s):
        if slowdown.at_s == 0 and slowdown.rank in config.placement.expert_ranks:
            speed[config.placement.expert_ranks.index(slowdown.rank)] = 1 / slowdown.factor
    return np.stack([plan_shares(batch[i], owners[i], per_token, reading, speed) for i in range(sizes.num_layers)])

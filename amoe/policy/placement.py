"""Which worker holds which expert. Pure functions of sizes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from amoe.errors import ConfigError
from amoe.types import Int16Array

Float64Array = npt.NDArray[np.float64]


def place_experts(num_layers: int, num_experts: int, num_owners: int) -> Int16Array:
    """Contiguous shares, the usual expert parallelism: owner o holds experts [o·E/D, (o+1)·E/D) of every layer.

    Returns:
        [num_layers, num_experts, 1] index of the owner (not its rank) of each expert; shares differ by at most one.

    Raises:
        ConfigError: more owners than experts: some would hold nothing.
    """
    if num_owners > num_experts:
        raise ConfigError(
            f"{num_owners} workers cannot share {num_experts} experts: use at most {num_experts} expert workers"
        )
    owners = (np.arange(num_experts) * num_owners // num_experts).astype(np.int16)
    return np.tile(owners[:, None], (num_layers, 1, 1))


def experts_of(owners: Int16Array, owner: int, sparse_layers: Sequence[bool]) -> dict[int, tuple[int, ...]]:
    """Experts per MoE layer that `owner` holds, replicas included, ascending: `{layer: (expert, ...)}`.

    Args:
        owners: [num_layers, num_experts, R], as `replicate_experts` makes them.
    """
    return {
        layer: tuple(int(expert) for expert in np.flatnonzero((owners[layer] == owner).any(axis=-1)))
        for layer, sparse in enumerate(sparse_layers)
        if sparse
    }


def replicate_experts(
    load: Float64Array, num_owners: int, slots_per_owner: int, *, anchored: bool = True
) -> Int16Array:
    """Place replicas of hot experts, as EPLB does, from measured loads.

    Args:
        load: [num_layers, num_experts] share or count of pairs.
        num_owners: D.
        slots_per_owner: experts of each layer that an owner can hold, replicas included; at least E / D.
        anchored: replica 0 stays where `place_experts` puts it, and only the spare slots are chosen; so the placement
            without replicas is contained in it, which matters at low load, where replicas sleep. Otherwise all slots
            are packed anew (DeepSeek's EPLB, github.com/deepseek-ai/EPLB, without its node groups).

    Returns:
        [num_layers, num_experts, R] owners, -1 where there is no replica; no owner twice for one expert.

    Raises:
        ConfigError: there are too few slots for all experts.
    """
    num_layers, num_experts = load.shape
    primary = place_experts(num_layers, num_experts, num_owners)[..., 0]
    if slots_per_owner < int(np.bincount(primary[0], minlength=num_owners).max()):
        raise ConfigError(
            f"{slots_per_owner} slots per expert worker cannot hold {num_experts} experts on {num_owners} workers"
        )
    slots = min(slots_per_owner, num_experts)
    place_layer = _anchored_layer if anchored else _packed_layer
    holders = [place_layer(load[layer], primary[layer], num_owners, slots) for layer in range(num_layers)]
    width = max(len(places) for layer in holders for places in layer)
    owners = np.full((num_layers, num_experts, width), -1, np.int16)
    for layer, places_of in enumerate(holders):
        for expert, places in enumerate(places_of):
            owners[layer, expert, : len(places)] = places
    return owners


def _anchored_layer(load: Float64Array, primary: Int16Array, num_owners: int, slots: int) -> list[list[int]]:
    """Again and again, a copy of what weighs most on the owner that is busiest goes to the one that is least busy."""
    places = [[int(owner)] for owner in primary]
    holds = np.zeros((len(load), num_owners), np.bool_)
    holds[np.arange(len(load)), primary] = True
    for _ in range(num_owners * slots - len(load)):
        parts = load / holds.sum(axis=1)
        busy = parts @ holds
        free = holds.sum(axis=0) < slots
        # An expert that all owners with a free slot hold already cannot be relieved further.
        useful = (free & ~holds).any(axis=1)
        hot = [owner for owner in np.argsort(-busy) if (holds[:, owner] & useful).any()]
        if not hot:
            break
        candidates = np.flatnonzero(holds[:, hot[0]] & useful)
        expert = int(candidates[parts[candidates].argmax()])
        owner = int(np.where(free & ~holds[expert], busy, np.inf).argmin())
        holds[expert, owner] = True
        places[expert].append(owner)
    return places


def _packed_layer(load: Float64Array, primary: Int16Array, num_owners: int, slots: int) -> list[list[int]]:
    """Copies for whoever weighs most per copy; then the heaviest copy first, to the least busy owner with room."""
    copies = np.ones(len(load), np.int64)
    for _ in range(num_owners * slots - len(load)):
        weight = np.where(copies < num_owners, load / copies, -1.0)
        copies[int(weight.argmax())] += 1
    parts = load / copies
    places: list[list[int]] = [[] for _ in load]
    busy, used = np.zeros(num_owners), np.zeros(num_owners, np.int64)
    for expert in np.repeat(np.arange(len(load)), copies)[np.argsort(-np.repeat(parts, copies), kind="stable")]:
        room = used < slots
        room[places[expert]] = False
        if not room.any():
            # Every owner with room has it: the copy would be useless, unless it is the only one.
            if places[expert]:
                continue
            room = used < slots
        owner = int(np.where(room, busy, np.inf).argmin())
        places[expert].append(owner)
        busy[owner] += parts[expert]
        used[owner] += 1
    return places

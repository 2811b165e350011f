"""Which worker holds which expert. Pure functions of sizes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from amoe.errors import ConfigError
from amoe.types import Int16Array, Int64Array

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
        anchored: replica 0 of the experts is spread evenly over the owners, as `place_experts` spreads them: so a
            placement without replicas is contained in it, which matters at low load, where all but one replica of
            each expert sleep. Otherwise nothing is promised of replica 0: DeepSeek's EPLB
            (github.com/deepseek-ai/EPLB), without its node groups.

    Returns:
        [num_layers, num_experts, R] owners, -1 where there is no replica; no owner twice for one expert.

    Raises:
        ConfigError: there are too few slots for all experts.
    """
    num_layers, num_experts = load.shape
    if num_owners > num_experts:  # only replicas give everybody something to hold
        anchored = False
    primary = place_experts(num_layers, num_experts, min(num_owners, num_experts))[..., 0]
    if slots_per_owner < int(np.bincount(primary[0]).max()):
        raise ConfigError(
            f"{slots_per_owner} slots per expert worker cannot hold {num_experts} experts on {num_owners} workers"
        )
    slots = min(slots_per_owner, num_experts)
    holders = [_packed_layer(load[layer], num_owners, slots) for layer in range(num_layers)]
    if anchored:
        holders = [
            _with_primaries(holders[layer], _even_room(primary[layer], num_owners))
            or _with_primaries(holders[layer], _even_room(primary[layer], num_owners) + _spare_room(primary[layer]))
            or _anchored_layer(load[layer], primary[layer], num_owners, slots)
            for layer in range(num_layers)
        ]
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


_FEW_PRIMARIES = 8


def _even_room(primary: Int16Array, num_owners: int) -> Int64Array:
    """[D] experts whose replica 0 an owner has if they are spread evenly."""
    return np.bincount(primary, minlength=num_owners)


def _spare_room(primary: Int16Array) -> int:
    """One more than even is nearly even where an owner has many."""
    return int(np.bincount(primary).min() >= _FEW_PRIMARIES)


def _with_primaries(places: list[list[int]], room: Int64Array) -> list[list[int]] | None:
    """The same places with replica 0 chosen so that owner d has at most room[d] [D] of them; None: impossible.

    A matching of experts with owners' shares: an owner that is full hands one of its experts on, if that one can go on
    elsewhere (augmenting paths).
    """
    kept: list[list[int]] = [[] for _ in room]

    def place(expert: int, visited: set[int]) -> bool:
        for owner in places[expert]:
            if owner in visited:
                continue
            visited.add(owner)
            if len(kept[owner]) < room[owner]:
                kept[owner].append(expert)
                return True
            for other in kept[owner]:
                if place(other, visited):
                    kept[owner].remove(other)
                    kept[owner].append(expert)
                    return True
        return False

    for expert in sorted(range(len(places)), key=lambda index: len(places[index])):
        if not place(expert, set()):
            return None
    owner_of = {expert: owner for owner, experts in enumerate(kept) for expert in experts}
    return [
        [owner_of[expert], *(owner for owner in places[expert] if owner != owner_of[expert])]
        for expert in range(len(places))
    ]


def _packed_layer(load: Float64Array, num_owners: int, slots: int) -> list[list[int]]:
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

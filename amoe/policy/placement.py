"""Which worker holds which expert. Pure functions of sizes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from amoe.errors import ConfigError
from amoe.types import BoolArray, Int16Array, Int64Array

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
    room = np.bincount(primary[0], minlength=num_owners) if anchored else None
    holders = [
        _packed_layer(weights, num_owners, slots) if room is None else _anchored_layer(weights, room, slots - room)
        for weights in load
    ]
    width = max(len(places) for layer in holders for places in layer)
    owners = np.full((num_layers, num_experts, width), -1, np.int16)
    for layer, places_of in enumerate(holders):
        for expert, places in enumerate(places_of):
            owners[layer, expert, : len(places)] = places
    return owners


def _anchored_layer(load: Float64Array, room: Int64Array, spare: Int64Array) -> list[list[int]]:
    """Owners of each expert; owner d has exactly room[d] first replicas and at most spare[d] further ones [D].

    The heaviest copies first, each to the least busy owner that has room for its kind; then copies of one kind change
    places while that relieves the busiest owner. Since the two kinds never mix, the first replicas stay even.
    """
    copies = _count_copies(load, len(room), int((room + spare).sum()))
    copies_of, owners, first = _deal(load, copies, room.copy(), spare.copy())
    _exchange(load, copies_of, owners, first, len(room))
    places: list[list[int]] = [[] for _ in load]
    for index in np.argsort(~first, kind="stable"):
        places[copies_of[index]].append(int(owners[index]))
    return places


def _deal(
    load: Float64Array, copies: Int64Array, room: Int64Array, spare: Int64Array
) -> tuple[Int64Array, Int64Array, BoolArray]:
    """(expert, owner, whether it is the first replica) of every copy that found a place; uses up `room` and `spare`."""
    busy = np.zeros(len(room))
    holds = np.zeros((len(load), len(room)), np.bool_)
    dealt: list[tuple[int, int, bool]] = []

    def put(expert: int, owner: int, free: Int64Array) -> None:
        holds[expert, owner] = True
        free[owner] -= 1
        busy[owner] += load[expert] / copies[expert]
        dealt.append((expert, owner, free is room))

    for expert in np.argsort(-load / copies, kind="stable").tolist():
        for free in [room] + [spare] * int(copies[expert] - 1):
            if (open_owners := (free > 0) & ~holds[expert]).any():
                put(expert, int(np.where(open_owners, busy, np.inf).argmin()), free)
    # Room that is left: whoever has it holds already what was to go there.
    for owner in np.repeat(np.arange(len(spare)), spare).tolist():
        if (missing := ~holds[:, owner]).any():
            put(int(np.where(missing, load / holds.sum(axis=1), -1.0).argmax()), owner, spare)
    experts, owners, first = (np.array(column) for column in zip(*dealt, strict=True))
    return experts, owners, first


def _exchange(load: Float64Array, experts: Int64Array, owners: Int64Array, first: BoolArray, num_owners: int) -> None:
    """Changes `owners`: copies of the busiest one change places with lighter ones of their kind, best pair first."""
    parts = (load / np.bincount(experts, minlength=len(load)))[experts]
    holds = np.zeros((len(load), num_owners), np.bool_)
    holds[experts, owners] = True
    busy = np.bincount(owners, weights=parts, minlength=num_owners)
    for _ in range(_EXCHANGES_PER_OWNER * num_owners):
        top = int(busy.argmax())
        mine = np.flatnonzero(owners == top)
        relief = parts[mine, None] - parts  # [copies of top, all copies]
        allowed = (first[mine, None] == first) & (relief > 0) & ~holds[experts[mine]][:, owners] & ~holds[experts, top]
        busier = np.where(allowed, np.maximum(busy[top] - relief, busy[owners] + relief), np.inf)
        here, there = np.unravel_index(int(busier.argmin()), busier.shape)
        if busier[here, there] >= busy[top] * (1 - 1e-9):
            return
        pair = np.array([mine[here], there])
        holds[experts[pair], owners[pair]] = False
        busy[owners[pair]] += np.array([-1, 1]) * relief[here, there]
        owners[pair] = owners[pair[::-1]]
        holds[experts[pair], owners[pair]] = True


_EXCHANGES_PER_OWNER = 4


def _count_copies(load: Float64Array, num_owners: int, num_slots: int) -> Int64Array:
    """[E] copies: one each, then always one more of what weighs most per copy, up to one per owner."""
    copies = np.ones(len(load), np.int64)
    for _ in range(num_slots - len(load)):
        weight = np.where(copies < num_owners, load / copies, -1.0)
        copies[int(weight.argmax())] += 1
    return copies


def _packed_layer(load: Float64Array, num_owners: int, slots: int) -> list[list[int]]:
    """Copies for whoever weighs most per copy; then the heaviest copy first, to the least busy owner with room."""
    copies = _count_copies(load, num_owners, num_owners * slots)
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

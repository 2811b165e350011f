"""Tables of who holds which expert, made from a table in force with few moves. Pure functions.

A table is `owners` [L, E, R]: the owners of every expert's copies, the primary first, -1 where there is none. `present`
[D] says which owners may hold anything; a table made here names nobody else. `load` [L, E] counts pairs; a layer of
zeros is one of which nothing is known. `speed` [D], > 0, is how fast the owners are: one of speed 2 shall have twice
the work of one of speed 1. How much an owner may hold, and how many copies there may be, is a `Room`.

Which steps are worth taking: `amoe.policy.layer_plan`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from amoe.errors import ConfigError
from amoe.policy.layer_plan import COPY, MOVE, LayerPlan
from amoe.policy.placement import experts_of
from amoe.types import BoolArray, Int16Array

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Room:
    """Bounds of each layer.

    Attributes:
        slots_per_owner: experts that an owner can hold.
        max_copies: of all experts together; copies beyond it are not made, those that exist may stay.
        wanted_copies: of all experts together; as many are made as far as there are slots, worth it or not.
    """

    slots_per_owner: int
    max_copies: int
    wanted_copies: int = 0


def room_for(owners: Int16Array, present: BoolArray, redundant_experts: int, speed: FloatArray | None = None) -> Room:
    """Everybody may hold an even share and the redundant experts, or as much as somebody holds now, who has the memory
    for it; and there shall be as many copies as the redundant experts make, and may be as many as there are now. Where
    some are slow, the fastest one's part by its speed counts for an even share."""
    holds = copies_at(owners, len(present)) & present
    num_experts, num_present = owners.shape[1], max(1, int(present.sum()))
    part = (
        1 / num_present if speed is None else float(speed[present].max(initial=0.0) / max(1e-9, speed[present].sum()))
    )
    slots = max(math.ceil(num_experts * part - 1e-9) + redundant_experts, int(holds.sum(axis=1).max(initial=0)))
    wanted = num_experts + num_present * redundant_experts
    return Room(min(slots, num_experts), max(wanted, int(holds.sum(axis=(1, 2)).max(initial=0))), wanted)


def rebalance(
    load: FloatArray, owners: Int16Array, present: BoolArray, room: Room, speed: FloatArray | None = None
) -> Int16Array:
    """The table for a load: the busiest owner of each layer is relieved by few moves, and replicas go to what is hot.

    Returns:
        [L, E, R'] every expert has a holder, nobody holds one twice, or more than his slots.

    Raises:
        ConfigError: there is no room for all experts.
    """

    def plan(layer: LayerPlan) -> None:
        layer.settle(present)
        layer.fill(present)
        layer.improve(present)

    return _planned(load, owners, present, room, speed, plan)


def spread_to(
    load: FloatArray,
    owners: Int16Array,
    present: BoolArray,
    room: Room,
    newcomers: BoolArray,
    speed: FloatArray | None = None,
) -> Int16Array:
    """The table once `newcomers` [D] are there, and those that are not `present` are not any more.

    Newcomers get their share of the load, and nothing moves between the others. What the leaving ones alone have held
    goes to whoever has least to do; of what they held beside others, what is hot gets another copy where there is room,
    and so does anything until there are the copies that are wanted.

    Returns:
        as `rebalance`.

    Raises:
        ConfigError: as `rebalance`.
    """

    def plan(layer: LayerPlan) -> None:
        targets = newcomers if newcomers.any() else present
        layer.settle(targets)
        layer.improve(targets, frozenset({MOVE, COPY}) if newcomers.any() else frozenset({COPY}))
        layer.fill(targets)

    return _planned(load, owners, present, room, speed, plan)


def _planned(
    load: FloatArray,
    owners: Int16Array,
    present: BoolArray,
    room: Room,
    speed: FloatArray | None,
    plan: Callable[[LayerPlan], None],
) -> Int16Array:
    holds, speed = copies_at(owners, len(present)), np.ones(len(present)) if speed is None else speed
    layers = []
    for index in range(len(owners)):
        layer = LayerPlan(
            load[index], holds[index], present, room.slots_per_owner, room.wanted_copies, room.max_copies, speed
        )
        plan(layer)
        layers.append(_ordered(layer, owners[index], speed))
    width = max(len(places) for layer in layers for places in layer)
    table = np.full((*owners.shape[:2], width), -1, np.int16)
    for index, places_of in enumerate(layers):
        for expert, places in enumerate(places_of):
            table[index, expert, : len(places)] = places
    return table


def _ordered(layer: LayerPlan, before: Int16Array, speed: FloatArray) -> list[list[int]]:
    """Owners of each expert, the primary first: chosen so that primaries alone are level too, which is all that there
    is to go by until somebody has planned shares. The others stay in the order that they had `before` [E, R]."""
    places = []
    for expert, held in enumerate(layer.holds):
        old = [owner for owner in before[expert].tolist() if owner >= 0 and held[owner]]
        places.append(old + [owner for owner in np.flatnonzero(held).tolist() if owner not in old])
    busy = np.zeros(layer.holds.shape[1])
    for expert in np.argsort(np.where(layer.copies > 1, -layer.load, -np.inf), kind="stable").tolist():
        takes = layer.load[expert] / speed
        first = min(places[expert], key=lambda owner: busy[owner] + takes[owner])
        places[expert].remove(first)
        places[expert].insert(0, first)
        busy[first] += takes[first]
    return places


def replicate(
    load: FloatArray, owners: Int16Array, present: BoolArray, layer: int, expert: int, count: int
) -> Int16Array:
    """The table with `count` owners of one expert. Those that have least to do in that layer take copies, and those
    that have most to do drop theirs; the primary stays. Asked for by name, it needs no slot.

    Raises:
        ConfigError: there is no such expert, or there are not so many owners.
    """
    num_layers, num_experts, width = owners.shape
    if not 0 <= layer < num_layers:
        raise ConfigError(f"layer {layer} does not exist: the model has layers 0 to {num_layers - 1}")
    if not 0 <= expert < num_experts:
        raise ConfigError(f"expert {expert} does not exist: a layer has experts 0 to {num_experts - 1}")
    if not 1 <= count <= int(present.sum()):
        raise ConfigError(
            f"an expert can have 1 to {int(present.sum())} copies, as many as there are expert workers, not {count}"
        )
    holds = copies_at(owners, len(present))[layer] & present
    busy = (load[layer] / np.maximum(holds.sum(axis=1), 1)) @ holds
    places = [owner for owner in owners[layer, expert].tolist() if owner >= 0 and present[owner]]
    while len(places) < count:
        places.append(min((o for o in np.flatnonzero(present).tolist() if o not in places), key=lambda o: busy[o]))
    while len(places) > count:
        places.remove(max(places[1:], key=lambda owner: busy[owner]))
    table = np.full((num_layers, num_experts, max(width, count)), -1, np.int16)
    table[..., :width] = owners
    table[layer, expert] = -1
    table[layer, expert, : len(places)] = places
    return table


def copies_at(owners: Int16Array, num_owners: int) -> BoolArray:
    """[L, E, D]: the owner holds a copy."""
    layers, experts, replicas = np.nonzero(owners >= 0)
    holds: BoolArray = np.zeros((*owners.shape[:2], num_owners), np.bool_)
    holds[layers, experts, owners[layers, experts, replicas]] = True
    return holds


def union(old: Int16Array, new: Int16Array) -> Int16Array:
    """Every copy of both tables. An owner may be named twice: it is for `orders_for`."""
    return np.concatenate((old, new), axis=-1)


def orders_for(owners: Int16Array, owner: int, sparse_layers: Sequence[bool]) -> list[list[int]]:
    """[L] ascending ids of the experts that `owner` holds: none of a layer without experts."""
    held = experts_of(owners, owner, sparse_layers)
    return [list(held.get(layer, ())) for layer in range(len(sparse_layers))]


def moves(old: Int16Array, new: Int16Array, num_owners: int, sparse_layers: Sequence[bool]) -> BoolArray:
    """[L, E, D] copies that are in `new` alone: each has to be read by its owner."""
    gained = copies_at(new, num_owners) & ~copies_at(old, num_owners)
    return gained & np.asarray(sparse_layers, np.bool_)[:, None, None]


def missing(owners: Int16Array, present: BoolArray, sparse_layers: Sequence[bool]) -> int:
    """(layer, expert) pairs that nobody who is present holds."""
    num_holders = (copies_at(owners, len(present)) & present).sum(axis=-1)
    return int((num_holders[np.asarray(sparse_layers, np.bool_)] == 0).sum())


def are_held_elsewhere(owners: Int16Array, owner: int, present: BoolArray, sparse_layers: Sequence[bool]) -> bool:
    """Whether somebody else who is present holds each expert that this owner holds."""
    copies = copies_at(owners, len(present))[np.asarray(sparse_layers, np.bool_)]
    others = present & (np.arange(len(present)) != owner)
    return bool((copies & others).any(axis=-1)[copies[..., owner]].all())


def num_replicas(owners: Int16Array, sparse_layers: Sequence[bool]) -> int:
    """Copies beyond one of each expert."""
    copies = (owners >= 0).sum(axis=-1)[np.asarray(sparse_layers, np.bool_)]
    return int(np.maximum(copies - 1, 0).sum())


def hottest(load: FloatArray, owners: Int16Array, present: BoolArray, speed: FloatArray | None = None) -> float:
    """How long the busiest owner of each layer takes, summed over the layers, if the holders of an expert share it by
    their speeds; 1 is as even as can be.

    The load of experts that nobody holds counts nowhere.
    """
    holds, speed = copies_at(owners, len(present)) & present, np.ones(len(present)) if speed is None else speed
    capacity = holds @ speed
    parts = np.where(capacity > 0, load / np.where(capacity > 0, capacity, 1.0), 0.0)
    busy = (parts[..., None] * holds).sum(axis=1)  # [L, D]
    even = float(load.sum()) / max(float(speed[present].sum()), 1e-9)
    return float(busy.max(axis=1).sum()) / even if even > 0 else 1.0

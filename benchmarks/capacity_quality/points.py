"""What is measured: every table's points."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from amoe.config import CapacityConfig, CapacityPhase
from benchmarks.capacity_quality.capping import Batching, Locality
from benchmarks.capacity_quality.measure import PHASES

FACTORS = (1.0, 1.25, 1.5, 2.0)
# Name of a method to the fields of its CapacityConfig.
METHODS: dict[str, dict[str, Any]] = {
    "drop by score": {},
    "drop by order": {"metric": "order"},
    "drop by reverse": {"metric": "reverse"},
    "drop by random": {"metric": "random"},
    "reroute": {"mode": "reroute"},
    "expanded, at most k": {"mode": "expanded"},
    "expanded": {"mode": "expanded", "exceed_top_k": True},
}
# What tells the rows of a point from those of others; its phases come on top.
KEY = ("table", "method", "factor", "keep_best", "scope", "local", "spread_mass", "prefill_batch", "decode_batch")
_TWO = ("drop by score", "reroute")


@dataclass(frozen=True)
class Point:
    """One setting.

    Attributes:
        table: that it belongs to.
        method: of `METHODS`, or what it is otherwise.
        top_k: instead of the model's own.
    """

    table: str
    method: str
    capacity: CapacityConfig
    batching: Batching
    phases: tuple[CapacityPhase, ...] = PHASES
    top_k: int | None = None

    def key(self) -> dict[str, Any]:
        """The fields of `KEY`, and `top_k`."""
        return {
            "table": self.table,
            "method": self.method,
            "factor": self.capacity.factor,
            "keep_best": self.capacity.keep_best,
            "scope": self.capacity.scope,
            "local": self.batching.local,
            "spread_mass": self.batching.spread_mass,
            "prefill_batch": self.batching.prefill,
            "decode_batch": self.batching.decode,
            "top_k": self.top_k,
        }


def every_point(lossless_factor: float, tables: tuple[str, ...]) -> list[Point]:
    """All points of `tables`.

    Args:
        lossless_factor: E / k, with which no expert can overflow: dropless through the very code that drops.
    """
    return [point for table in tables for point in TABLES[table](lossless_factor)]


def _point(table: str, method: str, factor: float, capacity: dict[str, Any] | None = None, **batching: Any) -> Point:
    config = CapacityConfig(factor=factor, **METHODS.get(method, {}), **(capacity or {}))
    return Point(table, method, config, Batching(**batching))


def _baselines(lossless_factor: float) -> Iterator[Point]:
    yield _point("baselines", "dropless", lossless_factor)
    for top_k in (1, 3, 4):
        yield Point("baselines", f"dropless, top-{top_k}", CapacityConfig(), Batching(), top_k=top_k)


def _main(lossless_factor: float) -> Iterator[Point]:
    for keep_best in (True, False):
        for method in METHODS:
            for factor in FACTORS:
                yield _point("main", method, factor, {"keep_best": keep_best})


def _device(lossless_factor: float) -> Iterator[Point]:
    for method in _TWO:
        for factor in FACTORS:
            yield _point("device", method, factor, {"scope": "device"})


def _sizes(lossless_factor: float) -> Iterator[Point]:
    for method in _TWO:
        for factor in (1.0, 1.5):
            for size in (32, 128):
                point = _point("sizes", method, factor, prefill=size)
                yield Point("sizes", method, point.capacity, point.batching, ("prefill",))
            yield _point("sizes", method, factor, decode=16)


def _local(lossless_factor: float) -> Iterator[Point]:
    places: tuple[Locality, ...] = ("source", "all")
    for local in places:
        for method in ("expanded, at most k", "expanded"):
            for factor in FACTORS:
                yield _point("local", method, factor, {"keep_best": False}, local=local)


def _weights(lossless_factor: float) -> Iterator[Point]:
    for method in (*_TWO, "drop by random", "expanded, at most k", "expanded"):
        for factor in (1.0, 1.5):
            for keep_best in (True, False):
                yield _point("weights", method, factor, {"keep_best": keep_best}, spread_mass=False)


def _tight(lossless_factor: float) -> Iterator[Point]:
    """Caps below the even share: as many pairs as stronger skew than the built-in model's loses at a wider one."""
    for method in _TWO:
        for factor in (0.75, 0.5, 0.35):
            yield _point("tight", method, factor)


TABLES = {
    "baselines": _baselines,
    "main": _main,
    "device": _device,
    "sizes": _sizes,
    "local": _local,
    "weights": _weights,
    "tight": _tight,
}

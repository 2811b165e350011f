"""Covering arrays: few combinations in which every pair of values of any two factors occurs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any


def all_combinations(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The whole matrix."""
    return [dict(zip(factors, values, strict=True)) for values in product(*factors.values())]


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """A greedy covering array: every pair of values of two factors is in some row. Deterministic."""
    rows = all_combinations(factors)
    pairs_of = [{((a, row[a]), (b, row[b])) for a, b in combinations(factors, 2)} for row in rows]
    missing = set().union(*pairs_of)
    chosen = []
    while missing:
        best = max(range(len(rows)), key=lambda index: len(pairs_of[index] & missing))
        chosen.append(rows[best])
        missing -= pairs_of[best]
    return chosen

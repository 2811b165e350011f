"""One point on one subset of the text, in whatever process: its rows."""

from __future__ import annotations

import functools
import json
from typing import Any

import torch

from amoe.builtin import builtin_model_path
from amoe.models.model import Model
from benchmarks.capacity_quality.capping import Batching
from benchmarks.capacity_quality.measure import WINDOWS, Scores, load, run_subset
from benchmarks.capacity_quality.points import Point
from benchmarks.capacity_quality.text import held_out_subsets

Row = dict[str, Any]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@functools.cache
def texts(subsets: int) -> list[torch.Tensor]:
    """Windows, as every point has them."""
    length = Batching().prompt + Batching().continuation + 1
    return held_out_subsets(builtin_model_path(), length, WINDOWS, subsets)


@functools.cache
def cached_model(dtype: str, top_k: int | None) -> Model:
    """One per process."""
    return load(builtin_model_path(), DTYPES[dtype], top_k)


def measure(point: Point, subset: int, subsets: int, dtype: str) -> list[Row]:
    """A row per phase of one point on one subset."""
    torch.set_num_threads(1)
    outcomes = run_subset(
        cached_model(dtype, point.top_k), texts(subsets)[subset], point.capacity, point.batching, point.phases
    )
    return [
        {
            **point.key(),
            "phase": phase,
            "subset": subset,
            "prompt": part_of_row(outcome.prompt),
            "continuation": part_of_row(outcome.continuation),
        }
        for phase, outcome in outcomes.items()
    ]


def part_of_row(scores: Scores) -> Row:
    """What a row has of a prompt or a continuation."""
    figures = {"nats": scores.nats, "accuracy": scores.accuracy, **scores.tally.figures()}
    return {name: round(value, 6) for name, value in figures.items()}


def as_text(content: Row) -> str:
    """JSON with a line per row."""
    return json.dumps(content, separators=(",", ":")).replace('{"table', '\n{"table') + "\n"

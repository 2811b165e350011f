"""What follows from the samples: medians, ratios within rounds, and what the machine would have allowed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from amoe.models.config import ModelConfig
from benchmarks.peers.roofline import Machine, step_cost
from benchmarks.peers.timing import Point


class Measured(Protocol):
    """A run of a system at a point in a round."""

    @property
    def system(self) -> str: ...
    @property
    def point(self) -> Point: ...
    @property
    def round(self) -> int: ...


S = TypeVar("S", bound=Measured)


@dataclass(frozen=True, slots=True)
class Middle:
    """Median, least and greatest; `count` 0: there is none."""

    median: float
    least: float
    greatest: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Middle:
        """Of values, of which there may be none."""
        if not values:
            return cls(float("nan"), float("nan"), float("nan"), 0)
        return cls(float(np.median(values)), min(values), max(values), len(values))


def middle(samples: Sequence[S], system: str, point: Point, figure: Callable[[S], float]) -> Middle:
    """Of a figure over all runs of a system at a point."""
    return Middle.of([figure(s) for s in samples if (s.system, s.point) == (system, point)])


def ratio(samples: Sequence[S], systems: tuple[str, str], point: Point, figure: Callable[[S], float]) -> Middle:
    """The first system's figure over the second's in the same round, over the rounds: they share its noise."""
    medians = []
    for number in sorted({s.round for s in samples}):
        mine = [s for s in samples if s.round == number]
        ours, theirs = (middle(mine, system, point, figure) for system in systems)
        if ours.count and theirs.count:
            medians.append(ours.median / theirs.median)
    return Middle.of(medians)


@dataclass(frozen=True, slots=True)
class Ceiling:
    """Tokens per second that the machine would allow."""

    decode: float
    prefill: float


def ceiling(config: ModelConfig, machine: Machine, point: Point, shares: Sequence[Sequence[float]]) -> Ceiling:
    """Of a point: the mean step of decoding, and the prompts as one step.

    Args:
        shares: [num_layers][num_experts] of each layer's pairs.
    """
    context = point.input_len + point.output_len / 2
    decode = step_cost(config, num_tokens=point.batch, context=context, shares=shares, num_logits=point.batch)
    num_tokens = point.batch * point.input_len
    prefill = step_cost(
        config,
        num_tokens=num_tokens,
        context=point.input_len / 2,
        shares=shares,
        num_logits=point.batch,
        is_decode=False,
    )
    return Ceiling(point.batch / decode.seconds(machine), num_tokens / prefill.seconds(machine))

"""What `benchmarks.validate_simulator` compares, and how it shows what came out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.closed_loop import Steady
from benchmarks.step_time import parse_placement

EMULATED_MODEL = "emulated"
# Workers that wait at a barrier have their host's work to do at the same moment, and share this machine's few cores:
# the more of them, the longer a step must be for the host not to count.
SLOWDOWN_PER_WORKER = 250


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One comparison.

    Attributes:
        model: `emulated`; or `builtin` or `small`, a checkpoint to run.
        placement: `4`, `2A+2E`.
        sigma: of the emulated routing; a checkpoint has its own.
        batch: running sequences in all.
    """

    model: str
    placement: str
    schedule: str
    batch: int
    sigma: float = 0.0

    @property
    def slowdown(self) -> float:
        """Of emulated devices and of simulated ones."""
        return SLOWDOWN_PER_WORKER * parse_placement(self.placement).num_workers

    def __str__(self) -> str:
        emulated = f", sigma {self.sigma:g}, slow {self.slowdown:g}" if self.model == EMULATED_MODEL else ""
        return f"{self.model}, {self.placement}, {self.schedule}{emulated}, batch {self.batch}"


def emulated_points() -> list[Point]:
    """Fourteen."""

    def point(placement: str, schedule: str, sigma: float, batch: int) -> Point:
        return Point(model=EMULATED_MODEL, placement=placement, schedule=schedule, sigma=sigma, batch=batch)

    schedules = ("lockstep", "lockstep:2", "progress", "waves")
    return [
        *(point("4", schedule, sigma, 32) for sigma in (0.0, 1.25) for schedule in schedules),
        *(point("8", schedule, 1.25, 128) for schedule in ("lockstep", "progress", "waves")),
        *(point("2A+2E", schedule, 1.25, 64) for schedule in ("lockstep", "progress", "waves")),
    ]


def cpu_points() -> list[Point]:
    """Ten."""
    return [
        Point(model=model, placement=placement, schedule=schedule, batch=16)
        for model in ("builtin", "small")
        for placement, schedules in (
            ("1", ("progress",)),
            ("2", ("lockstep", "progress", "waves")),
            ("1A+1E", ("progress",)),
        )
        for schedule in schedules
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What both sides say; `tokens_per_s` and `itl_s` are the simulator's.

    Attributes:
        raw_itl_s: real kernels: before the table was scaled to the speed that the machine had in the run.
        drift: real kernels: of the table from before the run to after it.
    """

    point: Point
    engine: Steady
    tokens_per_s: float
    itl_s: float
    raw_itl_s: float = 0.0
    drift: float = 0.0

    @property
    def throughput_error(self) -> float:
        """Of the simulator, relative to the engine."""
        return self.tokens_per_s / self.engine.tokens_per_s - 1

    @property
    def itl_error(self) -> float:
        """Of the simulator, relative to the engine."""
        return self.itl_s / self.engine.itl_s - 1


def table(comparisons: list[Comparison]) -> Iterator[str]:
    """Markdown."""
    is_emulated = comparisons[0].point.model == EMULATED_MODEL
    last = "host of a step" if is_emulated else "raw ITL ms | raw error | drift"
    yield f"| point | tokens/s | simulated | error | ITL ms | simulated | error | {last} | foreign cores |"
    yield "|---" * (9 if is_emulated else 11) + "|"
    for item in comparisons:
        engine = item.engine
        rates = f"{engine.tokens_per_s:.1f} | {item.tokens_per_s:.1f} | {item.throughput_error:+.1%}"
        gaps = f"{engine.itl_s * 1e3:.1f} | {item.itl_s * 1e3:.1f} | {item.itl_error:+.1%}"
        if is_emulated:
            rest = f"{engine.host_s / engine.step_s:.0%}"
        else:
            rest = f"{item.raw_itl_s * 1e3:.1f} | {item.raw_itl_s / engine.itl_s - 1:+.0%} | {item.drift:.0%}"
        yield f"| {item.point} | {rates} | {gaps} | {rest} | {engine.foreign_cpu:.2f} |"


def summary(comparisons: list[Comparison], goal: float) -> str:
    """Errors in a line."""
    errors = np.abs([[c.throughput_error, c.itl_error] for c in comparisons])
    met = int((errors < goal).all(axis=1).sum())
    worst, mean = errors.max(axis=0), errors.mean(axis=0)
    return (
        f"{met} of {len(comparisons)} points within {goal:.0%}; throughput: mean error {mean[0]:.1%}, "
        f"worst {worst[0]:.1%}; ITL: mean {mean[1]:.1%}, worst {worst[1]:.1%}"
    )

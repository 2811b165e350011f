"""Plots of throughput against latency, with matplotlib, which is an extra: it is imported when a plot is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from amoe.errors import ConfigError

SUFFIXES = (".svg", ".png", ".pdf")
MARKERS = "osD^vP*X<>"


@dataclass(frozen=True, slots=True)
class Point:
    """itl: seconds, the mean; per_device: tokens per second and device."""

    itl: float
    per_device: float


def check_plot(path: Path) -> None:
    """Before anything takes time.

    Raises:
        ConfigError: matplotlib is not installed, or the file is of no kind that it is asked for.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--plot {path}: the name must end in {', '.join(SUFFIXES)}")
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, which is not installed: pip install 'amoe[plot]'")


def write_plot(
    path: Path,
    title: str,
    curves: Mapping[str, Sequence[Point]],
    *,
    best: Point | None = None,
    slo_itl: float | None = None,
) -> None:
    """A line per alternative, over load; the recommended point in a ring, the SLO as a line.

    Raises:
        ConfigError: see `check_plot`.
    """
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # of the library's own state nothing is touched
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (name, points) in enumerate(curves.items()):
        ordered = sorted(points, key=lambda point: point.itl)
        itls, rates = [point.itl * 1e3 for point in ordered], [point.per_device for point in ordered]
        axes.plot(itls, rates, marker=MARKERS[number % len(MARKERS)], markersize=5, linewidth=1.3, label=name)
    if best is not None:
        axes.scatter([best.itl * 1e3], [best.per_device], s=220, facecolors="none", edgecolors="k", label="recommended")
    if slo_itl is not None:
        axes.axvline(slo_itl * 1e3, color="gray", linestyle="--", linewidth=1, label="SLO (of the p99)")
    axes.set_title(title, fontsize="medium")
    axes.set(xlabel="mean time between tokens (ms)", ylabel="output tokens/s per device")
    axes.set_xscale("log")
    for which in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        which(lambda itl, _: f"{itl:g}")  # 20 and not 2 × 10¹
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    figure.savefig(path)

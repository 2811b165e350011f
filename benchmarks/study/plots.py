"""Plots of the study, as SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.study.points import LOADS
from benchmarks.study.tables import OURS, group, mean, ratios
from benchmarks.study.task import Row

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # the backend has to be chosen first

plt.rcParams.update({"svg.hashsalt": "amoe", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})


def grid(points: dict[tuple[Any, ...], list[Row]], baselines: tuple[str, ...], path: Path) -> None:
    """Ratio of waves to the best baseline: one panel per model, skew across, a bar per load, stale hatched."""
    models = list(dict.fromkeys(key[0] for key in points))
    figure, axes = plt.subplots(1, len(models), figsize=(3.2 * len(models), 3.4), sharey=True, squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        keys = [key for key in points if key[0] == model]
        columns = list(dict.fromkeys((key[1], key[3]) for key in keys))
        for index, load in enumerate(LOADS):
            shown = [column for column, key in enumerate(columns) if (model, key[0], load, key[1]) in points]
            values = [ratios(points[model, columns[c][0], load, columns[c][1]], baselines) for c in shown]
            places = [column + (index - 1.5) * 0.2 for column in shown]
            means = [mean(value) for value in values]
            errors = [
                [middle - min(value) for middle, value in zip(means, values, strict=True)],
                [max(value) - middle for middle, value in zip(means, values, strict=True)],
            ]
            axis.bar(
                places, means, 0.2, yerr=errors, label=load, color=plt.cm.viridis(0.15 + 0.25 * index), ecolor="0.4"
            )
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(columns)), [f"σ {sigma}\n{placement}" for sigma, placement in columns], fontsize=7)
        axis.set_title(model)
        axis.set_ylim(bottom=0.8)
    axes[0][0].set_ylabel("throughput, waves / best baseline")
    axes[0][0].legend(title="load", fontsize=7, loc="upper left")
    _save(figure, path)


def scaling(rows: list[Row], path: Path) -> None:
    """Throughput per device against devices."""
    figure, axis = plt.subplots(figsize=(5, 3.4))
    for (system,), members in group(rows, ("system",)).items():
        ordered = sorted(members, key=lambda row: row["devices"])
        label = "waves, W = 2" if system == OURS else system
        axis.plot([row["devices"] for row in ordered], [row["throughput"] for row in ordered], "o-", label=label)
    axis.set_xscale("log", base=2)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("devices")
    axis.set_ylabel("tok/s per device")
    axis.legend()
    _save(figure, path)


def faults(rows: list[Row], path: Path) -> None:
    """Throughput over time, one panel per fault."""
    panels = group(rows, ("what",))
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.2), sharey=True, squeeze=False)
    for axis, ((what,), members) in zip(axes[0], panels.items(), strict=True):
        for (system,), series in group(members, ("system",)).items():
            ordered = sorted(series, key=lambda row: row["second"])
            axis.step(
                [row["second"] for row in ordered], [row["throughput"] for row in ordered], where="post", label=system
            )
        axis.set_title(f"one expert device {what}" if what != "slower by half" else "one expert device 1.5 × slower")
        axis.set_xlabel("seconds")
    axes[0][0].set_ylim(bottom=0)  # for all: they share the axis
    axes[0][0].set_ylabel("tok/s per device")
    axes[0][-1].legend()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)

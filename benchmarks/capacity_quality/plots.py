"""Plots of quality, as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt

from benchmarks.capacity_quality.task import Row
from benchmarks.study.tables import group

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # the backend has to be chosen first

plt.rcParams.update({"svg.hashsalt": "amoe", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})

Floats = npt.NDArray[np.float64]
Added = Callable[[Sequence[Row], str], tuple[float, float]]  # rows and part to (mean, standard error), nats
STYLES = {
    "drop by score": ("tab:blue", "o"),
    "drop by order": ("tab:orange", "v"),
    "drop by reverse": ("tab:red", "^"),
    "drop by random": ("tab:brown", "s"),
    "reroute": ("tab:green", "D"),
    "expanded, at most k": ("tab:purple", "P"),
    "expanded": ("tab:pink", "X"),
}
# (phase, part whose pairs are counted, part whose perplexity is shown, title)
PANELS = (
    ("prefill", "prompt", "prompt", "prompts capped:\ntheir own tokens"),
    ("prefill", "prompt", "continuation", "prompts capped:\ncontinuations, decoded exactly"),
    ("both", "continuation", "continuation", "prompts and decoding capped:\ncontinuations"),
)


def pairs(rows: Sequence[Row], dropless: Sequence[Row], added: Added, path: Path) -> None:
    """Perplexity over pairs per token: a line per method through its factors, a row of panels per `keep_best`.

    Errors are those of the difference to dropless. Beyond two pairs per token the axis is compressed.
    """
    figure, axes = plt.subplots(2, len(PANELS), figsize=(11, 7.5))
    for line, keep_best in zip(axes, (True, False), strict=True):
        for axis, (phase, counted, shown, title) in zip(line, PANELS, strict=True):
            chosen = [row for row in rows if row["phase"] == phase and row["keep_best"] == keep_best]
            for (method,), members in group(chosen, ("method",)).items():
                points = list(group(members, ("factor",)).values())
                perplexities = [math.exp(_mean(same, shown, "nats")) for same in points]
                errors = [value * added(same, shown)[1] for value, same in zip(perplexities, points, strict=True)]
                counts = [_mean(same, counted, "pairs_per_token") for same in points]
                _line(axis, counts, perplexities, errors, method)
            axis.axhline(math.exp(_mean(dropless, shown, "nats")), color="black", linewidth=0.8, linestyle="--")
            axis.set_title(f"{title}\n{'best pair kept' if keep_best else 'no pair protected'}", fontsize=9)
            axis.set_xscale("function", functions=(_compress, _stretch))
            axis.set_xticks([1.6, 1.7, 1.8, 1.9, 2.0, 3.0, 4.0])
            axis.set_xlim(1.6, 4.2)
        line[0].set_ylabel("perplexity (dashed: dropless)")
    for axis in axes[-1]:
        axis.set_xlabel("pairs per token of what is capped")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(labels), loc="lower center", fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    _save(figure, path)


def causes(rows: Sequence[Row], added: Added, path: Path) -> None:
    """Added loss where decoding is capped too, over gate mass lost, and over the load of the fullest expert."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True)
    chosen = [row for row in rows if row["phase"] == "both"]
    shown = (("mass_lost", 100, "gate mass lost, %"), ("peak", 1, "most loaded expert over the even share"))
    for axis, (name, factor, title) in zip(axes, shown, strict=True):
        for (method, keep_best), members in group(chosen, ("method", "keep_best")).items():
            points = list(group(members, ("factor",)).values())
            losses = [added(same, "continuation") for same in points]
            places = [factor * _mean(same, "continuation", name) for same in points]
            values, errors = ([loss[index] for loss in losses] for index in (0, 1))
            _line(axis, places, values, errors, method, hollow=not keep_best)
        axis.axhline(0, color="black", linewidth=0.8, linestyle="--")
        axis.set_xlabel(f"{title} (decoded tokens)")
    axes[0].set_ylabel("added nats per token (continuations)")
    axes[0].legend(fontsize=8, frameon=False, title="filled: best pair kept; hollow: none protected", title_fontsize=8)
    figure.tight_layout()
    _save(figure, path)


def _line(axis: Any, x: list[float], y: list[float], errors: list[float], method: str, *, hollow: bool = False) -> None:
    color, marker = STYLES[method]
    face, line, label = ("white", ":", None) if hollow else (color, "-", method)
    style = {"color": color, "marker": marker, "markersize": 5, "linewidth": 0.9, "elinewidth": 0.7}
    axis.errorbar(x, y, yerr=errors, markerfacecolor=face, linestyle=line, label=label, **style)


def _compress(pairs_per_token: Floats) -> Floats:
    return np.where(pairs_per_token < 2, pairs_per_token, 2 + (pairs_per_token - 2) / 8)


def _stretch(place: Floats) -> Floats:
    return np.where(place < 2, place, 2 + (place - 2) * 8)


def _mean(rows: Sequence[Row], part: str, name: str) -> float:
    return float(np.mean([row[part][name] for row in rows]))


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)

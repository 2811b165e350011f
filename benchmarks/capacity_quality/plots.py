"""Plots of quality, as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks.capacity_quality.task import Row
from benchmarks.study.tables import group

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # the backend has to be chosen first

plt.rcParams.update({"svg.hashsalt": "amoe", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})

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


def pairs(rows: Sequence[Row], dropless: Sequence[Row], path: Path) -> None:
    """Perplexity over pairs per token: a line per method through its factors, a row of panels per `keep_best`."""
    figure, axes = plt.subplots(2, len(PANELS), figsize=(11, 7), sharey="col", sharex=True)
    for line, keep_best in zip(axes, (True, False), strict=True):
        for axis, (phase, counted, shown, title) in zip(line, PANELS, strict=True):
            chosen = [row for row in rows if row["phase"] == phase and row["keep_best"] == keep_best]
            for (method,), members in group(chosen, ("method",)).items():
                points = [
                    (_mean(same, counted, "pairs_per_token"), math.exp(_mean(same, shown, "nats")))
                    for same in group(members, ("factor",)).values()
                ]
                color, marker = STYLES[method]
                axis.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=5, label=method, lw=1)
            axis.axhline(math.exp(_mean(dropless, shown, "nats")), color="black", linewidth=0.8, linestyle="--")
            axis.set_title(f"{title}\n{'best pair kept' if keep_best else 'no pair protected'}", fontsize=9)
        line[0].set_ylabel("perplexity")
    for axis in axes[-1]:
        axis.set_xlabel("pairs per token of what is capped")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(labels), loc="lower center", fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    _save(figure, path)


def mass(rows: Sequence[Row], added: Callable[[Sequence[Row], str], tuple[float, float]], path: Path) -> None:
    """Added loss over gate mass lost of decoded tokens, every point of every table; with errors."""
    figure, axis = plt.subplots(figsize=(6, 4.2))
    chosen = [row for row in rows if row["phase"] == "both" and row["spread_mass"]]
    keys = ("table", "factor", "keep_best", "local", "decode_batch")
    for (method,), members in group(chosen, ("method",)).items():
        points = list(group(members, keys).values())
        losses = [added(same, "continuation") for same in points]
        color, marker = STYLES[method]
        axis.errorbar(
            [100 * _mean(same, "continuation", "mass_lost") for same in points],
            [value for value, _ in losses],
            yerr=[error for _, error in losses],
            color=color, marker=marker, markersize=5, linestyle="", elinewidth=0.8, label=method,
        )  # fmt: skip
    axis.set_xlabel("gate mass lost, % (decoded tokens)")
    axis.set_ylabel("added nats per token (continuations)")
    axis.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    _save(figure, path)


def _mean(rows: Sequence[Row], part: str, name: str) -> float:
    return float(np.mean([row[part][name] for row in rows]))


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)

"""Tables and the frontier plot: speed on emulated devices against quality of the built-in model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # the backend has to be chosen first

Row = dict[str, Any]

plt.rcParams.update({"svg.hashsalt": "amoe", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})


def write(out: Path) -> Path:
    """`speed.md` and `frontier.svg` from `speed.json` and `quality.json` in `out`; returns the former's path."""
    content = json.loads((out / "speed.json").read_text())
    rows: list[Row] = content["rows"]
    curve = perplexity_by_loss(json.loads((out / "quality.json").read_text())["rows"])
    for row in rows:
        base = next(other for other in rows if _same(row, other) and other["capacity"] == "lossless")
        row["speedup"] = row["throughput"] / base["throughput"]
        # Rerouting loses less per pair: it has its own curve.
        kind = "reroute" if row["rerouted"] > 0 else "drop by score"
        row["perplexity"] = float(np.interp(row["dropped"] + row["rerouted"], *curve[kind]))
    lines = [
        "# Capacity on emulated H100s",
        "",
        f"`{content['command']}`, commit {content['commit']}, {content['date']}, {content['machine']}.",
        "",
        "Perplexity is the built-in model's at the same share of pairs touched (both phases), interpolated.",
        "",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        lines += [f"## {model}", "", *_table([row for row in rows if row["model"] == model]), ""]
    lines.append("![speed against quality](frontier.svg)")
    path = out / "speed.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    plot(rows, out / "frontier.svg")
    return path


def perplexity_by_loss(quality: list[Row]) -> dict[str, tuple[list[float], list[float]]]:
    """By method: shares of pairs touched, ascending, and the perplexity of continuations at each.

    Of what is added to the loss of the same text: tables may be of more text or of less.
    """
    dropless, curves = _dropless(quality), {}
    for method in ("drop by score", "reroute"):
        points = [(0.0, dropless)]
        for row in quality:
            is_capped = row["table"] in ("main", "tight") and row["phase"] == "both" and row["keep_best"]
            if is_capped and row["method"] == method:
                perplexity = dropless * math.exp(row["continuation_added_nats"])
                points.append((row["dropped"] + row["rerouted"], perplexity))
        points.sort()
        curves[method] = [share for share, _ in points], [perplexity for _, perplexity in points]
    return curves


def _dropless(quality: list[Row]) -> float:
    return next(float(row["perplexity"]) for row in quality if row["method"] == "dropless" and row["phase"] == "both")


def _same(row: Row, other: Row) -> bool:
    return (row["model"], row["schedule"]) == (other["model"], other["schedule"])


def _table(rows: list[Row]) -> list[str]:
    names: tuple[str, ...] = ("schedule", "capacity", "tok/s per device", "to lossless", "mean ITL ms", "p99 ITL ms")
    names += ("dropped", "rerouted", "gate mass lost", "perplexity")
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        cells = [row["schedule"], row["capacity"], f"{row['throughput']:,.0f}", f"{row['speedup']:.2f}"]
        cells += [f"{row['mean_itl_ms']:.1f}", f"{row['p99_itl_ms']:.1f}"]
        cells += [f"{row[name]:.1%}" for name in ("dropped", "rerouted", "mass_lost")]
        cells.append(f"{row['perplexity']:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def plot(rows: list[Row], path: Path) -> None:
    """One panel per model: perplexity to the right, throughput up; a line per schedule and way of measuring."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(1, len(models), figsize=(5 * len(models), 3.8), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        mine = [row for row in rows if row["model"] == model]
        for color, schedule in enumerate(dict.fromkeys(row["schedule"] for row in mine)):
            for style, (kind, marker) in {"-": ("drop γ", "o"), "--": ("slack", "s"), ":": ("reroute", "^")}.items():
                line = [
                    row
                    for row in mine
                    if row["schedule"] == schedule
                    and (row["capacity"] == "lossless" or row["capacity"].startswith(kind))
                    and not row["capacity"].endswith("device")
                ]
                if len(line) < 2:
                    continue
                line.sort(key=lambda row: row["perplexity"])
                axis.plot(
                    [row["perplexity"] for row in line],
                    [row["throughput"] for row in line],
                    style,
                    marker=marker,
                    color=f"C{color}",
                    label=f"{schedule}, {kind}",
                )
        axis.set_title(model)
        axis.set_xlabel("perplexity of the built-in model")
        axis.set_ylim(bottom=0)
    axes[0][0].set_ylabel("tok/s per device")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)

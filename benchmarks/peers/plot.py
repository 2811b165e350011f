"""One picture of the comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.peers.report import Results
from benchmarks.peers.results import middle

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # the backend has to be chosen first

_COLORS = {"amoe": "#c03020", "vLLM": "#4878a8", "llama.cpp": "#5a9a5a", "transformers": "#b08030"}


def plot(results: Results, path: Path) -> None:
    """Decode rates with the roofline, prefill, and what is left of the rate when it is served."""
    is_served = bool(results.served)
    figure, axes = plt.subplots(1, 2 + is_served, figsize=(4.4 * (2 + is_served), 3.8), layout="constrained")
    _decode(results, axes[0])
    _prefill(results, axes[1])
    if is_served:
        _served(results, axes[2])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylabel("tokens per second")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _decode(results: Results, axis: Any) -> None:
    batches = [point.batch for point in results.decode_points]
    for bandwidth, style in ((results.best_bandwidth, "--"), (results.machine.bandwidth, ":")):
        limits = [results.ceiling(point, bandwidth).decode for point in results.decode_points]
        axis.plot(batches, limits, style, color="0.4", label=f"roofline at {bandwidth / 1e9:.0f} GB/s")
    for system in results.systems:
        rates = [
            middle(results.offline, system, point, lambda s: s.timing.decode_rate) for point in results.decode_points
        ]
        medians = [rate.median for rate in rates]
        errors = [
            [rate.median - rate.least for rate in rates],
            [rate.greatest - rate.median for rate in rates],
        ]
        axis.errorbar(batches, medians, errors, marker="o", capsize=2, color=_COLORS[system], label=system)
    _logarithmic(axis, batches)
    axis.set_title("decode, offline: median and range", fontsize=9)
    axis.set_xlabel("sequences at once")
    axis.legend(fontsize=7)


def _prefill(results: Results, axis: Any) -> None:
    points = [*results.decode_points[-1:], *results.prefill_points]
    width = 0.8 / max(1, len(results.systems))
    for index, system in enumerate(results.systems):
        heights = [middle(results.offline, system, point, lambda s: s.timing.prefill_rate).median for point in points]
        places = [place + (index - (len(results.systems) - 1) / 2) * width for place in range(len(points))]
        axis.bar(places, heights, width, color=_COLORS[system], label=system)
    for place, point in enumerate(points):
        axis.hlines(results.ceiling(point).prefill, place - 0.45, place + 0.45, color="0.4", linestyles="--")
    axis.set_xticks(range(len(points)), [f"{point.batch} × {point.input_len}" for point in points])
    axis.set_title("prefill, offline; dashed: operations over measured peak", fontsize=9)
    axis.set_xlabel("prompts × tokens")


def _served(results: Results, axis: Any) -> None:
    points = list(dict.fromkeys(s.point for s in results.served))
    batches = [point.batch for point in points]
    for system in dict.fromkeys(s.system for s in results.served):
        served = [middle(results.served, system, point, lambda s: s.run.end_to_end).median for point in points]
        axis.plot(batches, served, "o-", color=_COLORS[system], label=f"{system}, over HTTP")
        offline = [middle(results.offline, system, point, lambda s: s.end_to_end).median for point in points]
        axis.plot(batches, offline, ":", color=_COLORS[system], label=f"{system}, offline")
    _logarithmic(axis, batches)
    axis.set_title("end to end, prefill included", fontsize=9)
    axis.set_xlabel("requests at once")
    axis.legend(fontsize=7)


def _logarithmic(axis: Any, batches: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(batches, [str(batch) for batch in batches])
    low, high = axis.get_ylim()
    ticks = [2**power for power in range(4, 13) if low <= 2**power <= high]
    axis.set_yticks(ticks, [str(tick) for tick in ticks])

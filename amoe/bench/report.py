"""Shows figures: tables for people, JSON for programs, and a probe of the machine beside them."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from amoe import __version__
from amoe.bench.record import Figures, Latency
from amoe.clock import Clock

PROBE_BYTES = 128 << 20  # of each thread: far more than any cache holds


def memory_bandwidth(clock: Clock, num_threads: int, repeats: int = 3) -> float:
    """Bytes per second that `num_threads` threads read from memory together, the best of `repeats` sweeps.

    Takes some 0.1 s. Decoding on a CPU is bound by it, and on a shared machine it varies.
    """
    arrays = [np.ones(PROBE_BYTES // 4, np.float32) for _ in range(num_threads)]
    best = 0.0
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(np.max, arrays))
        for _ in range(repeats):
            start = clock.now()
            list(pool.map(np.max, arrays))  # releases the interpreter lock
            best = max(best, num_threads * PROBE_BYTES / (clock.now() - start))
    return best


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Where figures were taken. `memory_bandwidth`: bytes per second, read by up to 8 cores together."""

    platform: str
    cores: int
    python: str
    torch: str
    memory_bandwidth: float

    @classmethod
    def here(cls, clock: Clock) -> Machine:
        """This machine, probed now."""
        cores = len(os.sched_getaffinity(0))
        return cls(
            platform=platform.platform(),
            cores=cores,
            python=platform.python_version(),
            torch=torch.__version__,
            memory_bandwidth=memory_bandwidth(clock, min(cores, 8)),
        )


def write_json(path: Path, kind: str, config: dict[str, Any], machine: Machine | None, results: Any) -> None:
    """Write a report: what was asked for, what came out, when, where and with which version."""
    report = {
        "benchmark": kind,
        "amoe_version": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(machine) if machine is not None else None,
        "config": config,
        "results": results,
    }
    path.write_text(json.dumps(_finite(report), indent=2) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """NaN, which JSON does not know, becomes null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_figures(console: Console, title: str, figures: Figures) -> None:
    """Tables of one run: counts and throughput, latencies, and failures if there are any."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    requests = f"{figures.completed} completed, {figures.failed} failed"
    if figures.interrupted:
        requests += f", {figures.interrupted} interrupted"
    for name, value in (
        ("requests", requests),
        ("duration", f"{figures.duration_s:.2f} s"),
        ("prompt tokens", f"{figures.prompt_tokens}"),
        ("output tokens", f"{figures.output_tokens}"),
        ("request throughput", f"{figures.requests_per_s:.3f} /s"),
        ("output token throughput", f"{figures.output_tokens_per_s:.1f} tokens/s"),
        ("total token throughput", f"{figures.total_tokens_per_s:.1f} tokens/s"),
        ("mean concurrency", f"{figures.mean_concurrency:.1f}"),
    ):
        table.add_row(name, value)
    console.print(table)
    console.print(_latency_table(figures))
    if figures.short:
        console.print(f"{figures.short} answers are shorter than asked for: they ended by themselves.")
    for kind, count in figures.failures.items():
        console.print(f"{count} × failed: {kind}", style="red", markup=False)


def _latency_table(figures: Figures) -> Table:
    table = Table(title="milliseconds", title_justify="left")
    table.add_column("")
    names = ("mean", "p50", "p90", "p99", "max")
    for name in names:
        table.add_column(name, justify="right")
    latencies: tuple[tuple[str, Latency], ...] = (
        ("first token (TTFT)", figures.time_to_first_token),
        ("between tokens (ITL)", figures.inter_token_latency),
        ("per token (TPOT)", figures.time_per_output_token),
        ("end to end", figures.end_to_end),
    )
    for label, latency in latencies:
        table.add_row(label, *(f"{getattr(latency, name):.2f}" if latency.count else "-" for name in names))
    return table


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One run of one variant in an interleaved comparison.

    Attributes:
        variant: what differs, e.g. the schedule.
        number: of the round, from 0.
        figures: of the run.
        memory_bandwidth: bytes per second, just before it.
        expert_imbalance: pairs of a layer's busiest expert over the layer's mean, averaged over layers; NaN: unknown.
    """

    variant: str
    number: int
    figures: Figures
    memory_bandwidth: float
    expert_imbalance: float = float("nan")


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Medians of a variant over its rounds, and against the first variant.

    Attributes:
        output_tokens_per_s, ttft_p50_ms, tpot_p50_ms, itl_p99_ms: medians over the rounds.
        ratio: median over the rounds of throughput divided by the first variant's of the same round.
        ratio_range: least and greatest of those.
    """

    variant: str
    output_tokens_per_s: float
    ttft_p50_ms: float
    tpot_p50_ms: float
    itl_p99_ms: float
    ratio: float
    ratio_range: tuple[float, float]


def compare(rounds: Sequence[Round]) -> list[Comparison]:
    """One line per variant, in the order of their first rounds. Ratios pair runs of one round: they share its noise."""
    variants = list(dict.fromkeys(r.variant for r in rounds))
    base = {r.number: r.figures.output_tokens_per_s for r in rounds if r.variant == variants[0]}
    lines = []
    for variant in variants:
        runs = [r for r in rounds if r.variant == variant]
        ratios = [r.figures.output_tokens_per_s / base[r.number] for r in runs if base.get(r.number)]
        ratios = ratios or [float("nan")]
        lines.append(
            Comparison(
                variant=variant,
                output_tokens_per_s=float(np.median([r.figures.output_tokens_per_s for r in runs])),
                ttft_p50_ms=float(np.median([r.figures.time_to_first_token.p50 for r in runs])),
                tpot_p50_ms=float(np.median([r.figures.time_per_output_token.p50 for r in runs])),
                itl_p99_ms=float(np.median([r.figures.inter_token_latency.p99 for r in runs])),
                ratio=float(np.median(ratios)),
                ratio_range=(min(ratios), max(ratios)),
            )
        )
    return lines


def print_comparison(console: Console, comparisons: Sequence[Comparison], num_rounds: int) -> None:
    """A table, one line per variant."""
    table = Table(title=f"medians of {num_rounds} interleaved rounds", title_justify="left")
    table.add_column("schedule")
    for name in ("tokens/s", "ratio", "ratio range", "TTFT p50 ms", "TPOT p50 ms", "ITL p99 ms"):
        table.add_column(name, justify="right")
    for line in comparisons:
        table.add_row(
            line.variant,
            f"{line.output_tokens_per_s:.1f}",
            f"{line.ratio:.3f}",
            f"{line.ratio_range[0]:.3f}-{line.ratio_range[1]:.3f}",
            f"{line.ttft_p50_ms:.1f}",
            f"{line.tpot_p50_ms:.2f}",
            f"{line.itl_p99_ms:.2f}",
        )
    console.print(table)

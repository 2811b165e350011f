"""Shows simulations: a bar while they run, tables for people, JSON for programs."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from amoe import __version__
from amoe.sim.results import Results, Spread, WorkerFigures


class ProgressDisplay:
    """A bar on a terminal, nothing elsewhere. A context manager."""

    def __init__(self, console: Console, title: str) -> None:
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
            self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)
            self._task = self._bar.add_task(title, total=1.0)

    def __enter__(self) -> ProgressDisplay:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, share: float) -> None:
        """So much is done, 0 to 1."""
        if self._bar is not None:
            self._bar.update(self._task, completed=share)


def print_results(console: Console, title: str, results: dict[str, Results]) -> None:
    """A row per schedule."""
    table = Table(title=title, title_justify="left")
    table.add_column("schedule")
    for name in ("tokens/s", "per device", "ITL mean", "p50", "p99", "TTFT mean", "p99", "busy", "steps", "preempted"):
        table.add_column(name, justify="right")
    for name, result in results.items():
        busy = sum(worker.busy_fraction for worker in result.workers) / len(result.workers)
        table.add_row(
            name,
            f"{result.tokens_per_s:,.0f}",
            f"{result.tokens_per_s_per_device:,.0f}",
            *_milliseconds(result.inter_token_latency, "mean", "p50", "p99"),
            *_milliseconds(result.time_to_first_token, "mean", "p99"),
            f"{busy:.0%}",
            f"{result.num_steps:,}",
            str(sum(worker.num_preemptions for worker in result.workers)),
        )
    console.print(table)
    console.print("latencies in milliseconds; simulated, not measured", highlight=False)
    for name, result in results.items():
        if result.output_tokens == 0:
            console.print(f"{name}: no token left in the measured {result.window_s:.3f} s", style="yellow")


def print_workers(console: Console, title: str, result: Results) -> None:
    """A row per kind of worker: the idlest and the busiest tell how even the load is."""
    table = Table(title=f"workers, {title}", title_justify="left")
    table.add_column("role")
    for name in ("workers", "busy min", "mean", "max", "host", "tokens per attention", "experts", "head"):
        table.add_column(name, justify="right")
    roles = sorted({worker.role for worker in result.workers})
    for role in roles:
        workers = [worker for worker in result.workers if worker.role == role]
        busy = [worker.busy_fraction for worker in workers]
        table.add_row(
            role,
            str(len(workers)),
            *(f"{share:.1%}" for share in (min(busy), sum(busy) / len(busy), max(busy))),
            f"{sum(worker.host_fraction for worker in workers) / len(workers):.1%}",
            *(_mean_batch(workers, kind) for kind in ("attention", "experts", "head")),
        )
    console.print(table)


def _mean_batch(workers: list[WorkerFigures], kind: str) -> str:
    figures = [worker.blocks[kind] for worker in workers if kind in worker.blocks]
    steps = sum(item.steps for item in figures)
    return f"{sum(item.steps * item.mean_batch for item in figures) / steps:,.1f}" if steps else "-"


def _milliseconds(spread: Spread, *names: str) -> list[str]:
    return [f"{getattr(spread, name) * 1e3:,.2f}" if spread.count else "-" for name in names]


def write_json(path: Path, config: dict[str, Any], results: dict[str, Any]) -> None:
    """Write a report: what was asked for, what came out by schedule, when and with which version."""
    report = {
        "simulation": config,
        "amoe_version": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
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

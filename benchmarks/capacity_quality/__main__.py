"""Run it: `python -m benchmarks.capacity_quality [--tables main,device,...] [--subsets 4] [--out DIR]`.

Rows are written as they come, so that an interrupted run goes on where it was; the tables and plots are made from all
subsets of the text that are complete.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from amoe.builtin import builtin_model_path
from amoe.models.model import Model
from benchmarks.capacity_quality import report
from benchmarks.capacity_quality.capping import Batching
from benchmarks.capacity_quality.measure import WINDOWS, difference_to_reference, load
from benchmarks.capacity_quality.points import KEY, TABLES, Point, every_point
from benchmarks.capacity_quality.substitution import substitution
from benchmarks.capacity_quality.task import DTYPES, Row, as_text, measure, texts

_TOLERANCE = 1e-3  # of a logit, in float32


def main() -> int:
    """Measure what is missing, write the report. Returns the exit status."""
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    file, started = args.out / "quality.json", time.monotonic()
    earlier = {} if args.again or not file.exists() else json.loads(file.read_text(encoding="utf-8"))
    rows: list[Row] = earlier.get("by_subset", [])
    model = load(builtin_model_path())
    verify(model)
    points = every_point(model.config.num_experts / model.config.top_k, tuple(args.tables))
    done = {(row["subset"], identity(row)) for row in rows}
    missing = [
        (point, subset)
        for subset in range(args.subsets)
        for point in points
        if (subset, identity(point.key())) not in done
    ]
    for found in run_points(missing, args):
        rows += found
        rows.sort(key=lambda row: (row["subset"], list(TABLES).index(row["table"])))  # stable
        content = {**facts(args, earlier.get("seconds", 0.0) + time.monotonic() - started), "by_subset": rows}
        file.write_text(as_text(content), encoding="utf-8")
    content = json.loads(file.read_text(encoding="utf-8"))
    content["substitution"] = substitution(model, texts(1)[0][:16], Batching())
    file.write_text(as_text(content), encoding="utf-8")
    print(f"{time.monotonic() - started:.0f} s; report: {report.write(args.out)}")
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.capacity_quality", description=__doc__)
    parser.add_argument("--tables", type=lambda text: text.split(","), default=list(TABLES), help=", ".join(TABLES))
    parser.add_argument("--subsets", type=int, default=4, help=f"of {WINDOWS} windows each; the text has 7")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="with a thread each")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/capacity"))
    parser.add_argument("--again", action="store_true", help="measure also what is there already")
    args = parser.parse_args()
    unknown = [table for table in args.tables if table not in TABLES]
    if unknown:
        parser.error(f"there is no table {unknown[0]!r}; known: {', '.join(TABLES)}")
    return args


def facts(args: argparse.Namespace, seconds: float) -> Row:
    """Where the rows come from."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "command": f"python -m benchmarks.capacity_quality --subsets {args.subsets} --dtype {args.dtype}",
        "commit": found.stdout.strip() or "unknown",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "seconds": round(seconds, 1),
    }


def identity(row: Row) -> tuple[Any, ...]:
    """Equal for the rows of one point (those of its phases differ in nothing else)."""
    return tuple(row[name] for name in KEY)


def verify(model: Model) -> None:
    """The dropless path computes what the slow reference does."""
    small = Batching(prompt=24, continuation=7, prefill=16, decode=2)
    difference = difference_to_reference(model, texts(1)[0][:2, : 24 + 7 + 1], small)
    if difference > _TOLERANCE:
        raise AssertionError(f"logits differ from amoe.models.reference by {difference}")


def run_points(missing: list[tuple[Point, int]], args: argparse.Namespace) -> Iterator[list[Row]]:
    """The rows of each point and subset, as they come."""
    columns = (TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    context = multiprocessing.get_context("spawn")
    with (
        Progress(*columns, TimeRemainingColumn()) as progress,
        ProcessPoolExecutor(args.processes, mp_context=context) as pool,
    ):
        bar = progress.add_task("points", total=len(missing))
        futures = [pool.submit(measure, point, subset, args.subsets, args.dtype) for point, subset in missing]
        for count, future in enumerate(as_completed(futures), start=1):
            yield future.result()
            progress.advance(bar)
            if not progress.console.is_terminal:
                progress.console.print(f"{count} of {len(missing)}")


if __name__ == "__main__":
    raise SystemExit(main())

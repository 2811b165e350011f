"""Run the study: `python -m benchmarks.study [--parts grid,slow,...] [--seeds 2] [--out DIR]`.

Every part writes its rows as JSON when it is done, so that an interrupted study goes on where it was, and the report
with its plots is made from all rows that are there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.study import core_parts, engine_part, flow_parts, report
from benchmarks.study.task import Row, Task

# In this order: what takes longest and is most to be looked at first.
PARTS: dict[str, Callable[[argparse.Namespace], Sequence[Task]]] = {
    "cross-check": lambda args: flow_parts.cross_check(),
    "grid": lambda args: flow_parts.grid(args.seeds),
    "slow": lambda args: flow_parts.slow_device(args.seeds),
    "ablations": lambda args: flow_parts.ablations(args.seeds),
    "sensitivity": lambda args: flow_parts.sensitivity(),
    "paper": lambda args: core_parts.paper(args.iterations),
    "policies": lambda args: core_parts.policies(args.iterations),
    "serving": lambda args: core_parts.serving(args.serving_seconds),
    "faults": lambda args: core_parts.faults(args.fault_seconds),
    "scaling": lambda args: flow_parts.scaling(args.largest),
    # Real processes: the machine must be theirs alone, so this part runs by itself and last.
    "engine": lambda args: engine_part.tasks(args.engine),
}
ALONE = {"engine"}


def main() -> int:
    """Run the chosen parts and write the report. Returns the exit status."""
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    for part in args.parts:
        file = args.out / f"{part}.json"
        if file.exists() and not args.again:
            print(f"{part}: there already ({file}); --again measures anew")
            continue
        begun, used = time.monotonic(), processor_seconds()
        rows = run_part(part, list(PARTS[part](args)), 1 if part in ALONE else args.processes)
        content = {
            "part": part,
            "command": "python -m benchmarks.study " + " ".join(f"--{key} {value}" for key, value in options(args)),
            "commit": commit(),
            "date": datetime.now(UTC).date().isoformat(),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
            "seconds": round(time.monotonic() - begun, 1),
            "processor_seconds": round(processor_seconds() - used, 1),
            "rows": rows,
        }
        file.write_text(json.dumps(content, indent=None, separators=(",", ":")) + "\n", encoding="utf-8")
    written = report.write(args.out)
    print(f"{time.monotonic() - started:.0f} s; report: {written}")
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--seeds", type=int, default=2, help="of routing, per point (32 devices: 1)")
    parser.add_argument("--iterations", type=int, default=3, help="measured passes of the token-level parts")
    parser.add_argument("--fault-seconds", type=float, default=1.8, help="simulated")
    parser.add_argument("--serving-seconds", type=float, default=0.9, help="simulated")
    parser.add_argument("--largest", type=int, default=256, help="devices to scale to; 1024: half an hour, 6 GB")
    parser.add_argument("--engine", choices=("brief", "full"), default="brief", help="full: all, half an hour")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/study"))
    parser.add_argument("--again", action="store_true", help="measure parts whose results are there already")
    args = parser.parse_args()
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}; known: {', '.join(PARTS)}")
    return args


def processor_seconds() -> float:
    """Of this process and of its children that have ended: what a part costs whatever else the machine does."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def commit() -> str:
    """Of the code that is measured."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def options(args: argparse.Namespace) -> list[tuple[str, object]]:
    """What changes figures."""
    names = ("seeds", "iterations", "fault-seconds", "serving-seconds", "largest", "engine")
    return [(name, getattr(args, name.replace("-", "_"))) for name in names]


def run_part(part: str, tasks: list[Task], processes: int) -> list[Row]:
    """All rows of a part, in the order of its tasks."""
    columns = (TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows: list[list[Row]] = [[] for _ in tasks]
    with Progress(*columns, TimeRemainingColumn()) as progress:
        bar = progress.add_task(part, total=len(tasks))
        if processes == 1:
            for index, task in enumerate(tasks):
                rows[index] = task.run()
                progress.advance(bar)
        else:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(processes, mp_context=context) as pool:
                futures = {pool.submit(task.run): index for index, task in enumerate(tasks)}
                for future in as_completed(futures):
                    rows[futures[future]] = future.result()
                    progress.advance(bar)
                    if not progress.console.is_terminal:
                        progress.console.print(f"{part}: {sum(map(bool, rows))} of {len(tasks)}")
    return [row for part_rows in rows for row in part_rows]


if __name__ == "__main__":
    raise SystemExit(main())

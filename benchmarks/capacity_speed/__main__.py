"""Speed against quality: `python -m benchmarks.capacity_speed [--out DIR] [--again]`.

Runs are kept one by one, so that an interrupted benchmark goes on where it was. Quality comes from the rows that
`python -m benchmarks.capacity_quality` has left beside.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.capacity_speed import report
from benchmarks.capacity_speed.runs import run, settings


def main() -> None:
    """Run what is missing, and write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.capacity_speed", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/capacity"))
    parser.add_argument("--again", action="store_true", help="measure what has been measured already")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "speed.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() and not args.again else []
    known = {(row["model"], row["schedule"], row["capacity"]) for row in rows}
    missing = [item for item in settings() if (item.model, item.schedule, item.label) not in known]
    columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn()) as progress:
        bar = progress.add_task("", total=len(missing))
        for setting in missing:
            progress.update(bar, description=f"{setting.model} {setting.schedule} {setting.label}")
            rows.append(run(setting))
            file.write_text(json.dumps({**_origin(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
            progress.advance(bar)
    print(f"report: {report.write(args.out)}")


def _origin() -> dict[str, str]:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "command": "python -m benchmarks.capacity_speed",
        "commit": found.stdout.strip() or "unknown",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
    }


if __name__ == "__main__":
    main()

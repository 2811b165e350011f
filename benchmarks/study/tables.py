"""From rows to tables: grouping, the best baseline of a point, means and ranges over seeds, Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.study.task import Row

OURS = "waves"


def group(rows: Iterable[Row], keys: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of `keys`, in the order of their first appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row.get(key) for key in keys)].append(row)
    return dict(groups)


def mean(values: Iterable[float]) -> float:
    """Of at least one value."""
    listed = list(values)
    return sum(listed) / len(listed)


def best_baseline(rows: Iterable[Row], baselines: Sequence[str]) -> tuple[str, float]:
    """(name, mean throughput over the seeds) of the baseline with the highest mean: one system for all seeds."""
    by_name = {name: [row["throughput"] for row in rows if row["system"] == name] for name in baselines}
    means = {name: mean(values) for name, values in by_name.items() if values}
    name = max(means, key=lambda key: means[key])
    return name, means[name]


def ratios(rows: Sequence[Row], baselines: Sequence[str], system: str = OURS) -> list[float]:
    """Throughput of `system` over the best baseline's, seed by seed (the baseline is the best of all seeds' mean)."""
    name, _ = best_baseline(rows, baselines)
    reference = {row["seed"]: row["throughput"] for row in rows if row["system"] == name}
    return [row["throughput"] / reference[row["seed"]] for row in rows if row["system"] == system]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`mean (least-greatest)`; the mean alone where all round to it."""
    middle, low, high = mean(values), min(values), max(values)
    text = f"{middle:.{digits}f}"
    if f"{low:.{digits}f}" == f"{high:.{digits}f}":
        return text
    return f"{text} ({low:.{digits}f}–{high:.{digits}f})"


def markdown(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A table."""
    text = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    text += ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]
    return "\n".join(text) + "\n"

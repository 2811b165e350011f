"""What a run of `benchmarks.scale_out` tells: rates, waits, and how soon they follow a change."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks.chaos.streams import Answer

WINDOW_S = 2.0  # of a wait: a mean over so long
MIN_PHASE_S = 3.0  # streams that march together get their tokens together: a rate over less says nothing
MIN_CHANGE = 0.15  # relative, of a wait, below which nothing has changed
_PLOT_WINDOW_S = 4.0


@dataclass(frozen=True, slots=True)
class Sample:
    """What /metrics tells at a moment (monotonic seconds), cumulative.

    Attributes:
        age_s: seconds that tokens have waited for others at expert workers; tokens: so many went through their steps.
        join_s: seconds from dispatch to last answer, at the homes; joins: of so many tokens, over all layers.
    """

    at: float
    age_s: float = 0.0
    tokens: float = 0.0
    join_s: float = 0.0
    joins: float = 0.0


@dataclass
class Change:
    """Something that was asked of the server, or of the load. Times are monotonic seconds."""

    title: str
    asked: float
    done: float = 0.0
    also: str = ""


@dataclass
class Record:
    """All that was seen.

    Attributes:
        first: what was there at the beginning.
        complaints: of requests that were not answered as they should be.
    """

    first: str
    began: float = field(default_factory=time.monotonic)
    ended: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


Waits = list[tuple[float, float]]  # (when, how long tokens had waited in the last `WINDOW_S`)


def waits_of(samples: Sequence[Sample], kind: str = "age") -> Waits:
    """The queue age (`age`) or the wait for experts (`join`) in sliding windows, where any token ran.

    A counter that is smaller than before is one of other workers: nothing is told of such a window.
    """
    values = [(one.at, one.age_s, one.tokens) if kind == "age" else (one.at, one.join_s, one.joins) for one in samples]
    waits, first = [], 0
    for last, (at, waited, count) in enumerate(values):
        while first + 1 < last and at - values[first + 1][0] >= WINDOW_S:
            first += 1
        _, waited_before, count_before = values[first]
        if at - values[first][0] >= WINDOW_S and count > count_before and waited >= waited_before:
            waits.append((at, (waited - waited_before) / (count - count_before)))
    return waits


def level(waits: Waits, start: float, end: float) -> float:
    """Median of the waits whose windows lie between two times; nan if there is none."""
    inside = [wait for at, wait in waits if start + WINDOW_S <= at < end]
    return float(np.median(inside)) if inside else float("nan")


@dataclass(frozen=True, slots=True)
class Answered:
    """How a wait followed a change.

    Attributes:
        before, after: its levels in the phases before and after.
        seconds: from the question until the window's mean was nearer to `after` than to `before`, and stayed so for as
            long as a window is; None: it did not change.
    """

    before: float
    after: float
    seconds: float | None


def answered(waits: Waits, change: Change, since: float, until: float) -> Answered:
    """See `Answered`; the phase before began at `since`, the one after ends at `until`."""
    before, after = level(waits, since, change.asked), level(waits, change.done, until)
    if not abs(after - before) > MIN_CHANGE * max(before, after):  # nan: not known
        return Answered(before, after, None)
    middle, crossed = (before + after) / 2, None
    for at, wait in waits:
        if not change.asked <= at < until:
            continue
        is_there = wait < middle if after < before else wait > middle
        crossed = (at if crossed is None else crossed) if is_there else None
        if crossed is not None and at - crossed >= WINDOW_S:
            break
    return Answered(before, after, None if crossed is None else crossed - change.asked)


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """Figures between two changes, nan where nothing can be said.

    Attributes:
        title: what was there.
        seconds: its length.
        tokens_per_s: streamed.
        age_ms: queue age; wait_ms: wait for experts.
        itl_p50_ms, itl_p99_ms: of gaps that ended within it.
    """

    title: str
    seconds: float
    tokens_per_s: float
    age_ms: float
    wait_ms: float
    itl_p50_ms: float
    itl_p99_ms: float


def phases_of(record: Record, fill_s: float) -> list[Phase]:
    """Before, between and after the changes, and the changes themselves; nothing is told of the first `fill_s`."""
    edges = [(record.first, record.began + fill_s)]
    for change in record.changes:
        edges += [(f"... {change.title}", change.asked), (change.title, change.done)]
    ages, waits = waits_of(record.samples), waits_of(record.samples, "join")
    gaps = np.array([gap for answer in record.answers for gap in pairwise(answer.times)]).reshape(-1, 2)
    times = np.array([at for answer in record.answers for at in answer.times])
    phases = []
    for (title, start), (_, end) in pairwise([*edges, ("", record.ended)]):
        lengths = (gaps[:, 1] - gaps[:, 0])[(gaps[:, 1] >= start) & (gaps[:, 1] < end)] * 1e3
        is_long = end - start >= MIN_PHASE_S and len(lengths) > 0
        rate = np.count_nonzero((times >= start) & (times < end)) / max(end - start, 1e-9)
        phases.append(
            Phase(
                title=title,
                seconds=end - start,
                tokens_per_s=rate if is_long else float("nan"),
                age_ms=level(ages, start, end) * 1e3,
                wait_ms=level(waits, start, end) * 1e3,
                itl_p50_ms=float(np.percentile(lengths, 50)) if is_long else float("nan"),
                itl_p99_ms=float(np.percentile(lengths, 99)) if is_long else float("nan"),
            )
        )
    return phases


def report(record: Record, fill_s: float) -> str:
    """Markdown."""
    lines = [
        "| phase | s | tokens/s | queue age ms | wait for experts ms | ITL ms p50 | p99 |",
        "|---|---|---|---|---|---|---|",
    ]
    for phase in phases_of(record, fill_s):
        figures = [phase.tokens_per_s, phase.age_ms, phase.wait_ms, phase.itl_p50_ms, phase.itl_p99_ms]
        places = [0, 1, 1, 0, 0]
        cells = [_number(value, digits) for value, digits in zip(figures, places, strict=True)]
        lines.append(f"| {phase.title} | {phase.seconds:.1f} | {' | '.join(cells)} |")
    lines.append("")
    ages = waits_of(record.samples)
    starts = [record.began + fill_s, *(change.done for change in record.changes)]
    ends = [*(change.asked for change in record.changes[1:]), record.ended]
    for change, since, until in zip(record.changes, starts, ends, strict=False):
        told = _told(answered(ages, change, since, until))
        lines.append(f"- {change.title}: done after {change.done - change.asked:.1f} s; {told}{change.also}")
    failed = f"{len(record.complaints)} failed: {record.complaints[0]}" if record.complaints else "none failed"
    lines.append(f"- {len(record.answers)} requests, {failed}")
    return "\n".join(lines)


def _told(how: Answered) -> str:
    levels = f"{_number(how.before * 1e3, 1)} to {_number(how.after * 1e3, 1)} ms"
    if how.seconds is None:
        return f"the queue age stayed ({levels})"
    return f"the queue age went from {levels}, half of the way after {how.seconds:.1f} s"


def _number(value: float, digits: int) -> str:
    return "–" if np.isnan(value) else f"{value:.{digits}f}"


def plot(path: Path, record: Record) -> None:
    """Tokens per second and the queue age over time, with the changes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 4.5), sharex=True, layout="constrained")
    times = np.array([at for answer in record.answers for at in answer.times]) - record.began
    starts = np.arange(0.0, max(0.0, times.max() - _PLOT_WINDOW_S), 0.25)
    counts = np.array([np.count_nonzero((times >= at) & (times < at + _PLOT_WINDOW_S)) for at in starts])
    top.fill_between(starts + _PLOT_WINDOW_S / 2, counts / _PLOT_WINDOW_S, color="#4878a8", alpha=0.8, linewidth=0)
    top.set_ylabel("tokens per second", fontsize=8)
    waits = np.array(waits_of(record.samples)).reshape(-1, 2)
    bottom.plot(waits[:, 0] - record.began, waits[:, 1] * 1e3, color="#a05020", linewidth=1.4)
    bottom.set_ylabel("queue age, ms", fontsize=8)
    bottom.set_xlabel("seconds", fontsize=8)
    for panel in (top, bottom):
        panel.set_ylim(bottom=0)
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
        for one in record.changes:
            panel.axvspan(one.asked - record.began, one.done - record.began, color="#c0c0c0", alpha=0.5, linewidth=0)
    for number, one in enumerate(record.changes):
        height = 1.0 + 0.09 * (number % 2)
        place = (one.done - record.began, height)
        top.annotate(one.title, place, xycoords=("data", "axes fraction"), fontsize=7, ha="left", va="bottom")
    figure.savefig(path, dpi=110)
    plt.close(figure)

"""Tables and pictures of what faults did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.chaos.figures import Figures, throughput
from benchmarks.chaos.run import Run

_BIN_S = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One run with faults.

    Attributes:
        server: its workers and flags, for a person.
        faults: what happened.
        leaks: what was left, see `Residue.leaks`.
        memory_mib: resident, of all processes: before and after.
        usage: what the usage of the answers told of experts that were missing.
    """

    server: str
    faults: str
    figures: Figures
    leaks: list[str]
    memory_mib: tuple[float, float]
    usage: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)


_HEAD = (
    "| workers | fault | failed | identical | noticed after s | all serve again after s "
    "| longest silence of all s (over after s) | longest gap of a stream s | ITL p99 ms before / during / after "
    "| left behind | resident MiB before / after |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    return "\n".join([*_HEAD, *(_line(row) for row in rows)])


def _line(row: Row) -> str:
    f = row.figures
    serving = "never" if f.serving_s is None else f"{f.serving_s:.1f}"
    noticed = ", ".join("-" if seconds is None else f"{seconds:.2f}" for seconds in f.noticed_s)
    lost = ", ".join(f"{name} {value:g}" for name, value in row.usage.items())
    identical = f"{f.num_identical} of {f.num_streams}" + (f" (usage: {lost})" if lost else "")
    p99 = " / ".join(f"{value:.0f}" for value in (f.p99_before_ms, f.p99_during_ms, f.p99_after_ms))
    memory = " / ".join(f"{value:.0f}" for value in row.memory_mib)
    left = "; ".join(row.leaks) or "nothing"
    return (
        f"| {row.server} | {row.faults} | {f.num_failed} | {identical} | {noticed} | {serving} | "
        f"{f.silence_s:.1f} ({f.resumed_s:.1f}) | {f.longest_gap_s:.1f} | {p99} | {left} | {memory} |"
    )


def plot(path: Path, runs: Sequence[tuple[str, Run]]) -> None:
    """Tokens per second over time, one panel for each run, with its faults and when all served again."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        len(runs), 1, figsize=(9, 0.6 + 1.15 * len(runs)), sharex=True, squeeze=False, layout="constrained"
    )
    for panel, (title, run) in zip(panels[:, 0], runs, strict=True):
        times, rates = throughput(run.answers, run.began, _BIN_S)
        panel.fill_between(times, rates, step="mid", color="#4878a8", alpha=0.8, linewidth=0)
        for incident in run.incidents:
            panel.axvline(incident.began - run.began, color="#c03020", linewidth=1.4)
            if incident.healed is not None:
                panel.axvline(incident.healed - run.began, color="#208040", linewidth=1.4, linestyle="--")
        panel.set_title(title, fontsize=8, loc="left", pad=2)
        panel.tick_params(labelsize=7)
        panel.set_ylim(bottom=0)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1, 0].set_xlabel("seconds since the requests were sent", fontsize=8)
    figure.supylabel("tokens per second", fontsize=8)
    figure.suptitle("red: the fault; green, dashed: all workers serve again", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)

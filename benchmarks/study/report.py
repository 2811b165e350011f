"""The report: a Markdown file with a table per part, and plots, from the JSON files of the parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from amoe.sim.flow.systems import BASELINES
from benchmarks.study import plots
from benchmarks.study.tables import OURS, best_baseline, group, markdown, mean, ratios, spread
from benchmarks.study.task import Row

NAMES = tuple(system.name for system in BASELINES)
POINT = ("model", "sigma", "load", "placement")


def write(out: Path) -> Path:
    """Write `report.md` and the plots beside the JSON files in `out`; returns the path of the report."""
    parts = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(out.glob("*.json"))}
    sections = [text for name, make in SECTIONS.items() if name in parts for text in (make(parts[name]["rows"], out),)]
    lines = [
        "# The study: figures\n",
        "Made by `python -m benchmarks.study`; what they mean is told beside this file.\n",
    ]
    lines += [
        markdown(
            ("part", "date", "commit", "seconds", "command", "machine"),
            [
                (name, p["date"], p.get("commit", ""), p["seconds"], f"`{p['command']}`", p["machine"])
                for name, p in parts.items()
            ],
        )
    ]
    path = out / "report.md"
    path.write_text("\n".join([*lines, *sections]), encoding="utf-8")
    return path


def grid_section(rows: list[Row], out: Path) -> str:
    """Goal by goal, then every point."""
    # Where memory is full at `high` already, `saturated` is the same point: it counts once.
    points = group(rows, POINT)
    full = {(key[0], members[0]["sequences"]) for key, members in points.items() if key[2] == "saturated"}
    points = {
        key: members
        for key, members in points.items()
        if key[2] == "saturated" or (key[0], members[0]["sequences"]) not in full
    }
    plots.grid(points, NAMES, out / "grid.svg")
    lines = []
    for (model, sigma, load, placement), members in points.items():
        ours = [row for row in members if row["system"] == OURS]
        name, throughput = best_baseline(members, NAMES)
        lines.append(
            (
                model, sigma, f"{load} ({ours[0]['sequences']})", placement, f"{name} {throughput:.0f}",
                f"{mean(row['throughput'] for row in ours):.0f}", spread(ratios(members, NAMES), 3),
                "/".join(str(waves) for waves in sorted({row["waves"] for row in ours})),
                f"{mean(row['mean_itl_ms'] for row in ours):.1f}", f"{mean(row['p99_itl_ms'] for row in ours):.1f}",
                f"{mean(row['tail'] for row in ours):.2f}", f"{mean(row['of_bound'] for row in ours):.2f}",
                f"{mean(row['of_placed_bound'] for row in ours):.2f}",
            )
        )  # fmt: skip
    header = ("model", "σ", "load", "placement", "best baseline", "waves", "ratio", "W", "ITL ms", "p99", "p99/mean",
              "of bound", "of placed bound")  # fmt: skip
    return "\n".join(
        ["## Grid\n", "tok/s per device, mean over seeds; ratios with their range over seeds.\n",
         "![ratio to the best baseline](grid.svg)\n", goals(points), markdown(header, lines)]
    )  # fmt: skip


def goals(points: dict[tuple[Any, ...], list[Row]]) -> str:
    """How many points meet the goals, and the worst of each."""
    fresh = {key: mean(ratios(rows, NAMES)) for key, rows in points.items() if key[3] == "fresh"}
    stale = {key: mean(ratios(rows, NAMES)) for key, rows in points.items() if key[3] == "stale"}
    ours = {key: [row for row in rows if row["system"] == OURS] for key, rows in points.items()}
    tails = {key: max(row["tail"] for row in rows) for key, rows in ours.items()}
    full = {key: mean(row["of_bound"] for row in rows) for key, rows in ours.items() if key[2] == "saturated"}

    def line(what: str, values: dict[tuple[Any, ...], float], goal: float, upper: bool = False) -> tuple[object, ...]:
        met = sum((value <= goal) if upper else (value >= goal) for value in values.values())
        worst = (max if upper else min)(values, key=lambda key: values[key])
        return what, f"{met} of {len(values)}", f"{values[worst]:.3f} at {', '.join(str(part) for part in worst)}"

    table = [
        line("≥ 1.0 × the best baseline (0.995 counts), all points", {**fresh, **stale}, 0.995),
        line("≥ 0.98 × the best baseline, all points", {**fresh, **stale}, 0.98),
        line("≥ 1.5 × where the placement is stale", stale, 1.5),
        line("p99/mean ITL ≤ 1.1, worst seed", tails, 1.1, upper=True),
        line("≥ 0.85 of the bound when saturated", full, 0.85),
    ]
    return markdown(("goal", "met", "worst"), table)


def slow_section(rows: list[Row], out: Path) -> str:
    """Ours, and what it is worth to know speeds without asynchrony."""
    lines = []
    for key, members in group(rows, ("model", "sigma", "load")).items():
        name, throughput = best_baseline(members, NAMES)
        columns = (OURS, "waves, even homes", "llep, knows speeds")
        lines.append(
            (*key, f"{name} {throughput:.0f}", *(spread(ratios(members, NAMES, column)) for column in columns))
        )
    header = ("model", "σ", "load", "best baseline", "waves", "without home shares", "llep that knows speeds")
    return "\n".join(
        ["## One of eight devices 1.5 × slower\n", "Ratios to the best baseline.\n", markdown(header, lines)]
    )


def systems_section(title: str, keys: tuple[str, ...], value: str = "throughput") -> Any:
    """A section with a row per system and a column per point."""

    def section(rows: list[Row], out: Path) -> str:
        text = [f"## {title}\n"]
        for key, members in group(rows, keys).items():
            named = ", ".join(f"{name} {part}" for name, part in zip(keys, key, strict=True) if part is not None)
            systems = group(members, ("system",))
            best = max(mean(row[value] for row in systems[(name,)]) for name in NAMES if (name,) in systems) if any(
                (name,) in systems for name in NAMES
            ) else None  # fmt: skip
            lines = []
            for (system,), found in systems.items():
                average = mean(row[value] for row in found)
                extra = [f"{found[0][name]:.2f}" if isinstance(found[0].get(name), float) else found[0].get(name, "")
                         for name in ("waves", "tail", "of_bound", "mean_itl_ms")]  # fmt: skip
                lines.append((system, f"{average:.0f}", f"{average / best:.3f}" if best else "", *extra))
            header = ("system", "tok/s/device", "of best baseline", "W", "p99/mean", "of bound", "mean ITL ms")
            text += [f"**{named}**\n", markdown(header, lines)]
        return "\n".join(text)

    return section


def cross_check_section(rows: list[Row], out: Path) -> str:
    """Beside the first study's figures."""
    lines = []
    for (model, sigma, placement, sequences), members in group(
        rows, ("model", "sigma", "placement", "sequences")
    ).items():
        theirs = STUDY.get((model, sigma, placement, sequences))
        name, throughput = best_baseline(members, NAMES)
        ours = next(row for row in members if row["system"] == OURS)
        lines.append(
            (model, sigma, placement, sequences, theirs[0] if theirs else "", f"{name} {throughput:.0f}",
             theirs[1] if theirs else "", f"{ours['throughput'] / throughput:.3f}", ours["waves"])
        )  # fmt: skip
    header = (
        "model",
        "σ",
        "placement",
        "C",
        "study: best sync",
        "ours: best baseline",
        "study: waves",
        "ours: waves",
        "W",
    )
    return "\n".join(["## Cross-check with the first study\n", markdown(header, lines)])


# async-study.md, second study, "Best wave / best sync" with host 0: best synchronous system in tok/s/device, and ratio.
STUDY = {
    ("Mixtral top-1", 0.0, "fresh", 512): ("S0 8704", 1.000),
    ("Mixtral top-1", 0.0, "fresh", 2048): ("S0 27164", 1.000),
    ("Mixtral top-1", 0.0, "fresh", 8192): ("S12 36967", 1.002),
    ("Mixtral top-1", 0.0, "fresh", 16384): ("S12 39632", 1.002),
    ("Mixtral top-1", 1.0, "fresh", 512): ("S0 8261", 1.003),
    ("Mixtral top-1", 1.0, "fresh", 2048): ("S1 20039", 1.000),
    ("Mixtral top-1", 1.0, "fresh", 8192): ("S12 35462", 1.016),
    ("Mixtral top-1", 1.0, "fresh", 16384): ("S12 37743", 1.022),
    ("Qwen3-30B-A3B", 0.0, "fresh", 512): ("S0 8100", 1.000),
    ("Qwen3-30B-A3B", 0.0, "fresh", 2048): ("S0 19876", 1.000),
    ("Qwen3-30B-A3B", 0.0, "fresh", 8192): ("S2 31766", 1.000),
    ("Qwen3-30B-A3B", 0.0, "fresh", 16384): ("S12 34965", 1.000),
    ("Qwen3-30B-A3B", 1.0, "fresh", 512): ("S0 8011", 1.000),
    ("Qwen3-30B-A3B", 1.0, "fresh", 2048): ("S1 19367", 1.009),
    ("Qwen3-30B-A3B", 1.0, "fresh", 8192): ("S12 31561", 1.003),
    ("Qwen3-30B-A3B", 1.0, "fresh", 16384): ("S12 34963", 0.999),
    ("Mixtral top-1", 1.25, "stale", 8192): ("S12 wf 17425", 1.29),
    ("Mixtral top-1", 1.25, "stale", 16384): ("S12 wf 18045", 1.48),
}


def scaling_section(rows: list[Row], out: Path) -> str:
    """Throughput per device against the number of devices."""
    plots.scaling(rows, out / "scaling.svg")
    table = systems_section("Scaling, DeepSeek-V3 shape on H200, 256 sequences per device", ("devices",))(rows, out)
    return table.replace("\n\n", "\n\n![throughput per device](scaling.svg)\n\n", 1)


def serving_section(rows: list[Row], out: Path) -> str:
    """Latencies under Poisson arrivals."""
    lines = [
        (row["rate"], row["system"], f"{row['throughput']:.0f}",
         *(f"{row[name]:.1f}" for name in ("mean_itl_ms", "p99_itl_ms", "ttft_ms", "p99_ttft_ms")))
        for row in rows
    ]  # fmt: skip
    header = ("requests/s", "schedule", "tok/s/device", "mean ITL ms", "p99", "mean TTFT ms", "p99")
    return "\n".join(["## Serving: Poisson arrivals with prompts, OLMoE on 4 H100, σ = 1\n", markdown(header, lines)])


def faults_section(rows: list[Row], out: Path) -> str:
    """The plot, and means of the thirds of the time."""
    plots.faults(rows, out / "faults.svg")
    lines = []
    for (what, system), members in group(rows, ("what", "system")).items():
        thirds = [[], [], []]  # type: list[list[float]]
        for row in members:
            place = 3 * row["second"] / row["of"]
            if place % 1 >= 0.3 or row["throughput"] == 0:  # the beginning of each third is a transition
                thirds[min(2, int(place))].append(row["throughput"])
        lines.append((what, system, *(f"{mean(values):.0f}" if values else "" for values in thirds)))
    header = ("one expert device of 4 + 4", "system", "before", "middle third", "last third")
    return "\n".join(["## Faults\n", "![throughput over time](faults.svg)\n", markdown(header, lines)])


SECTIONS = {
    "grid": grid_section,
    "slow": slow_section,
    "paper": systems_section(
        "AMoE's setting, A100, σ = 1, 4,096 sequences", ("top_k", "workload", "placement", "devices")
    ),
    "policies": systems_section(
        "Schedules, token by token (H100 × 8, Mixtral top-1, σ = 1, no replicas)", ("sequences",)
    ),
    "ablations": systems_section("Ablations", POINT),
    "sensitivity": systems_section("Sensitivity", ("what", "model", "load", "placement")),
    "scaling": scaling_section,
    "serving": serving_section,
    "faults": faults_section,
    "engine": systems_section("The real engine on emulated H100s, σ = 1.25, stale placement", ("workers", "sequences")),
    "cross-check": cross_check_section,
}

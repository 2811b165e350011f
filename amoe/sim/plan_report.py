"""Shows a plan: a table of the alternatives, one sentence, the flags that realise it; JSON and a plot."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from amoe import __version__
from amoe.config import MAX_NUM_SEQS
from amoe.sim.flow.systems import WAVES
from amoe.sim.plan_plot import Point, write_plot
from amoe.sim.plan_search import ABOUT, Plan
from amoe.sim.planner import Option, Outcome, Scenario, most_sequences

COLUMNS = ("W", "replicas", "in flight", "tokens/s", "/device", "ITL mean", "p99", "of bound", "GB")


def name_of(option: Option) -> str:
    """Of an alternative, whatever its waves."""
    replicas = f", {option.redundant} replicas" if option.redundant else ""
    return f"{option.schedule}, {option.placement}{replicas}"


def print_plan(console: Console, title: str, scenario: Scenario, plan: Plan) -> None:
    """Table, what has no room, and what the figures rest on."""
    table = Table(title=title, title_justify="left")
    table.add_column("schedule", no_wrap=True)
    table.add_column("placement", no_wrap=True)
    slo = plan.goal.slo_itl is not None or plan.goal.rate is not None
    for name in (*COLUMNS, "SLO" if plan.goal.slo_itl is not None else "keeps up") if slo else COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for outcome in plan.outcomes:
        cells = _cells(outcome)
        if slo:
            cells.append("yes" if outcome.meets(plan.goal.slo_itl) else "no")
        table.add_row(*cells, style="bold green" if outcome is plan.best else None)
    console.print(table)
    for line in refusals(plan.refused):
        console.print(f"no room for {line}", highlight=False)
    for line in assumptions(scenario, plan):
        console.print(line, highlight=False)


def _cells(outcome: Outcome) -> list[str]:
    option = outcome.option
    share = "-" if outcome.bound_share is None else f"{outcome.bound_share:.0%}"
    return [
        option.schedule,
        f"{option.attention_devices} + {option.num_owners}" if option.attention_devices else option.placement,
        f"{outcome.waves}",
        f"{option.redundant}",
        f"{outcome.sequences:,}",
        f"{outcome.throughput:,.0f}",
        f"{outcome.per_device:,.0f}",
        f"{outcome.mean_itl * 1e3:.2f}",
        f"{outcome.p99_itl * 1e3:.2f}",
        share,
        f"{outcome.memory_bytes / 1e9:.1f}",
    ]


def refusals(refused: Sequence[tuple[Option, str]]) -> list[str]:
    """By kind of reason: placements with the fewest replicas for which there is no room, and why the first has none."""
    first: dict[tuple[str, str], tuple[Option, str]] = {}
    for option, reason in refused:
        key = (option.schedule, option.placement)
        if key not in first or option.redundant < first[key][0].redundant:
            first[key] = (option, reason)
    lines: dict[tuple[str, bool], list[tuple[Option, str]]] = {}
    for option, reason in first.values():
        lines.setdefault((reason.split()[0], option.redundant > 0), []).append((option, reason))
    named = [(dict.fromkeys(_least_replicas(option) for option, _ in group), group[0][1]) for group in lines.values()]
    return [f"{', '.join(names)} ({reason})" for names, reason in named]


def _least_replicas(option: Option) -> str:
    where = f"{option.attention_devices} + {option.num_owners}" if option.attention_devices else option.placement
    return f"{where} with {option.redundant} replicas or more" if option.redundant else where


def assumptions(scenario: Scenario, plan: Plan) -> list[str]:
    """What the figures rest on, in sentences."""
    prefill = "prompts are filled in elsewhere (--no-prefill): only decoding is counted"
    if scenario.prefill:
        share = plan.nearest.prefill_share
        prefill = (
            f"prefill: {scenario.input_len} prompt tokens at the compute roofline, shared by all devices and spread "
            f"evenly: {share:.0%} of the time of the first choice. It comes in chunks, so the real p99 is higher"
        )
    return [
        "placement A + D: attention workers + expert workers; W: waves; ITL in milliseconds; of bound: share of what "
        "no schedule could beat in decoding with all devices colocated. Simulated, not measured; nothing is counted "
        "for the host.",
        f"{prefill}. TTFT is not estimated: it depends on arrivals and chunks, which `amoe simulate` has.",
    ]


# ---- the sentence and the flags


def serve_flags(scenario: Scenario, plan: Plan, outcome: Outcome) -> list[str]:
    """Flags of `amoe serve` that realise an outcome of the schedule `waves`."""
    option = outcome.option
    flags = ["--colocated", f"{option.num_devices}"]
    if option.attention_devices:
        flags = ["--attention-workers", f"{option.attention_devices}", "--expert-workers", f"{option.num_owners}"]
    flags += ["--schedule", WAVES.name]
    if plan.goal.sequences is not None or plan.goal.rate is not None:  # else the engine follows the load
        flags += ["--waves", f"{outcome.waves}"]
    if option.redundant:
        flags += ["--redundant-experts", f"{option.redundant}"]
    return [*flags, "--max-num-seqs", f"{_max_num_seqs(scenario, plan, outcome)}"]


def _max_num_seqs(scenario: Scenario, plan: Plan, outcome: Outcome) -> int:
    """Per attention worker. At a rate, the number in flight varies about its mean like that of Poisson arrivals."""
    count = float(outcome.sequences)
    if plan.goal.rate is not None:
        count = min(count + 3 * math.sqrt(count), most_sequences(scenario, outcome.option))
    return min(MAX_NUM_SEQS, math.ceil(count / outcome.option.num_homes))


def recommendation(scenario: Scenario, plan: Plan, model: str) -> list[str]:
    """Sentences: what to do, how to do it, and whether lockstep would do better."""
    best = plan.nearest
    what = f"{best.option.placement}, {best.waves} wave{'s' * (best.waves > 1)}"
    if best.option.redundant:
        what += f", redundant experts: {best.option.redundant} per device and layer"
    share = "" if best.bound_share is None else f", {best.bound_share:.0%} of the bound"
    figures = (
        f"{best.throughput:,.0f} tokens/s ({best.per_device:,.0f} per device), ITL {best.mean_itl * 1e3:.2f} ms mean, "
        f"{best.p99_itl * 1e3:.2f} ms p99, with {best.sequences:,} sequences in flight{share}"
    )
    if plan.best is None:
        why = "keeps up and meets the SLO" if best.sustained else "keeps up with the rate"
        return [f"no placement {why}; the nearest is {what}: {figures}"]
    name = model if Path(model).is_dir() else "MODEL"
    flags = shlex.join(["amoe", "serve", name, *serve_flags(scenario, plan, best)])
    lines = [f"recommended: {what}: {figures}", f"  {flags}"]
    if best.option.redundant:
        lines.append("  and --expert-load FILE, as `amoe bench offline --save-expert-load FILE` measures it")
    return lines + _better_lockstep(plan, best)


def _better_lockstep(plan: Plan, best: Outcome) -> list[str]:
    """Told if it is so: a planner that only knows one answer is no planner."""
    same = [o for o in plan.outcomes if o.option.num_devices == best.option.num_devices]
    rivals = [o for o in same if o.option.schedule != WAVES.name and o.meets(plan.goal.slo_itl)]
    if plan.goal.rate is None:
        ahead = [o for o in rivals if o.throughput > best.throughput * (1 + ABOUT)]
    else:
        ahead = [o for o in rivals if o.mean_itl * (1 + ABOUT) < best.mean_itl]
    return [
        f"note: {name_of(o.option)} does better here: {o.throughput:,.0f} tokens/s, ITL {o.mean_itl * 1e3:.2f} ms"
        for o in ahead
    ]


# ---- files


def write_plan(path: Path, config: dict[str, Any], scenario: Scenario, plan: Plan) -> None:
    """Everything: what was asked for, all alternatives, all other loads, and the recommendation."""
    best = None if plan.best is None else as_dict(plan.best)
    if best is not None and plan.best is not None:
        best["serve_flags"] = serve_flags(scenario, plan, plan.best)
    report = {
        "plan": config,
        "amoe_version": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "goal": asdict(plan.goal),
        "assumptions": assumptions(scenario, plan),
        "recommended": best,
        "alternatives": [as_dict(outcome) for outcome in plan.outcomes],
        "no_room": [{**asdict(option), "reason": reason} for option, reason in plan.refused],
        "loads": [as_dict(outcome) for outcome in plan.points],
    }
    path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def as_dict(outcome: Outcome) -> dict[str, Any]:
    """The option's fields beside the figures, in seconds and bytes."""
    figures = asdict(outcome)
    return {**figures.pop("option"), **figures, "per_device": outcome.per_device}


def plot_plan(path: Path, title: str, plan: Plan) -> None:
    """Raises `ConfigError` where matplotlib is missing."""
    curves: dict[str, list[Point]] = {}
    automatic = any(o.option.waves is None and o.option.schedule == WAVES.name for o in plan.outcomes)
    for outcome in plan.points or plan.outcomes:
        if outcome.sustained and not (automatic and outcome.option.waves):
            curves.setdefault(name_of(outcome.option), []).append(_point(outcome))
    over_load = {name: points for name, points in curves.items() if len(points) > 2} or curves
    best = None if plan.best is None else _point(plan.best)
    write_plot(path, title, over_load, best=best, slo_itl=plan.goal.slo_itl)


def _point(outcome: Outcome) -> Point:
    return Point(outcome.mean_itl, outcome.per_device)

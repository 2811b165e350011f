"""Tables and plots from the rows of `quality.json`: `quality.md` and SVGs beside it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.capacity_quality import plots
from benchmarks.capacity_quality.capping import Tally
from benchmarks.capacity_quality.points import KEY, TABLES
from benchmarks.capacity_quality.task import Row, as_text
from benchmarks.study.tables import group, markdown

Rows = Sequence[Row]
Column = tuple[str, Callable[[Rows], object]]


class Paired:
    """Rows against others, mostly dropless, on the same subsets of the text."""

    def __init__(self, others: Rows) -> None:
        """One of them per subset."""
        self._others = {row["subset"]: row for row in others}

    def added(self, rows: Rows, part: str, name: str = "nats") -> tuple[float, float]:
        """(mean, standard error over subsets) of what the others do not have."""
        values = [row[part][name] - self._others[row["subset"]][part][name] for row in rows]
        error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return float(np.mean(values)), error

    def cell(self, rows: Rows, part: str) -> str:
        """Added nats, in brackets where they are noise."""
        value, error = self.added(rows, part)
        text = f"{value:+.4f} ± {error:.4f}"
        return f"({text})" if abs(value) <= 2 * error else text


def perplexity(rows: Rows, part: str) -> float:
    """Of all subsets together: they are of equal size."""
    return math.exp(np.mean([row[part]["nats"] for row in rows]))


def mean(rows: Rows, part: str, name: str) -> float:
    """Over subsets."""
    return float(np.mean([row[part][name] for row in rows]))


def write(out: Path) -> Path:
    """Write `quality.md` and the plots into `out`, and the means over subsets into its `quality.json`, as `rows`.

    Returns:
        the path of the tables.
    """
    file = out / "quality.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    rows = complete(content["by_subset"])
    subsets = {name: len({row["subset"] for row in rows if row["table"] == name}) for name in TABLES}
    dropless = [row for row in rows if row["method"] == "dropless" and row["phase"] == "prefill"]
    paired = Paired(dropless)
    file.write_text(as_text({**content, "rows": means(rows, paired)}), encoding="utf-8")
    lines = [
        "# Capacity and quality: figures\n",
        f"`{content['command']}`, {content['date']}, commit {content['commit']}, {content['machine']}, "
        f"{content['seconds']:.0f} s, subsets of 64 windows: "
        f"{', '.join(f'{count} ({name})' for name, count in subsets.items())}. What they mean is told in "
        "[2026-11-22-capacity-quality.md](../2026-11-22-capacity-quality.md).\n",
        LEGEND,
        *(text for make in SECTIONS for text in make(rows, paired)),
        *_substitution(content.get("substitution", [])),
    ]
    main = [row for row in rows if row["table"] == "main"]
    plots.pairs(main, dropless, paired.added, out / "pairs.svg")
    plots.causes(main, paired.added, out / "causes.svg")
    path = out / "quality.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def complete(rows: Rows) -> list[Row]:
    """Rows of the subsets for which their table has every point."""
    counts = Counter((row["table"], row["subset"]) for row in rows)
    full = {table: max(count for (name, _), count in counts.items() if name == table) for table, _ in counts}
    return [row for row in rows if counts[row["table"], row["subset"]] == full[row["table"]]]


def means(rows: Rows, paired: Paired) -> list[Row]:
    """A flat row per point and phase. Shares are those of the tokens that only this phase caps: prompts, or decodes."""
    found = []
    for members in group(rows, (*KEY, "phase")).values():
        capped = "prompt" if members[0]["phase"] == "prefill" else "continuation"
        row = {name: members[0][name] for name in (*KEY, "phase")}
        for part in ("prompt", "continuation"):
            added, error = paired.added(members, part)
            row[f"{part}_perplexity"] = perplexity(members, part)
            row |= {f"{part}_added_nats": added, f"{part}_error": error}
        row |= {"perplexity": row["continuation_perplexity"], "accuracy": mean(members, "continuation", "accuracy")}
        shares = {name: mean(members, capped, name) for name in Tally(tokens=1, routed=1, batches=1).figures()}
        rounded = {name: value if isinstance(value, str | bool) else _round(value) for name, value in row.items()}
        found.append({**rounded, **{name: _round(value) for name, value in shares.items()}, "subsets": len(members)})
    return found


def _round(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(value, 6)


LEGEND = """How to read the tables. *Added* is what the loss has more than dropless on the same text, in nats per token
(0.01 nats is 1 % of perplexity), `±` its standard error over the subsets, *in brackets* where it is smaller than twice
that: noise. Shares (%) are of the router's pairs (`dropped`, `rerouted`, `over`: kept beyond the cap because they are a
token's best), of gate mass (`mass lost`), of (token, layer) without any expert (`empty`), `±` their standard deviation
over the subsets where it is at least 0.1. `peak`: pairs of the most loaded expert over the even share, mean over
micro-batches and layers; `device`: the same of the most loaded of the devices.
"""


def cost(paired: Paired, part: str) -> Column:
    """Added nats of a part."""
    return f"{part}: added nats", lambda rows: paired.cell(rows, part)


def accuracy(paired: Paired, part: str) -> Column:
    """Next-token accuracy, in percent, and by how many points it differs."""

    def cell(rows: Rows) -> str:
        value, error = (100 * x for x in paired.added(rows, part, "accuracy"))
        text = f"{value:+.2f} ± {error:.2f}"
        return f"{100 * mean(rows, part, 'accuracy'):.1f}, " + (f"({text})" if abs(value) <= 2 * error else text)

    return "accuracy %", cell


def shares(part: str) -> list[Column]:
    """What was done to the tokens of a part."""

    def share(name: str, factor: float, digits: int) -> Callable[[Rows], str]:
        def cell(rows: Rows) -> str:
            values = factor * np.array([row[part][name] for row in rows])
            spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
            text = f"{values.mean():.{digits}f}"
            return text + (f" ± {spread:.1f}" if factor > 1 and spread >= 0.1 else "")

        return cell

    columns: list[Column] = [("pairs/token", share("pairs_per_token", 1, 3))]
    named = (("dropped", "dropped"), ("rerouted", "rerouted"), ("mass lost", "mass_lost"), ("empty", "empty"))
    columns += [(title, share(name, 100, 1)) for title, name in (*named, ("over", "over"))]
    return [*columns, ("peak", share("peak", 1, 2)), ("device", share("device_peak", 1, 2))]


def perplexities(part: str) -> Column:
    """Of a part."""
    return f"{part}: perplexity", lambda rows: f"{perplexity(rows, part):.3f}"


def table(rows: Iterable[Row], keys: Sequence[str], columns: Sequence[Column]) -> str:
    """A line for each value of `keys`."""
    names = {
        "factor": "γ",
        "prefill_batch": "prefill tokens",
        "decode_batch": "decode tokens",
        "keep_best": "keep best",
    }
    lines = [[*key, *(cell(members) for _, cell in columns)] for key, members in group(rows, keys).items()]
    return markdown([names.get(key, key) for key in keys] + [name for name, _ in columns], lines)


def _prefill_columns(paired: Paired) -> list[Column]:
    rest = [perplexities("continuation"), cost(paired, "continuation"), accuracy(paired, "continuation")]
    return [*shares("prompt"), perplexities("prompt"), cost(paired, "prompt"), *rest]


def _both_columns(paired: Paired) -> list[Column]:
    rest = [perplexities("continuation"), cost(paired, "continuation"), accuracy(paired, "continuation")]
    return [*shares("continuation"), *rest]


def _baselines(rows: Rows, paired: Paired) -> list[str]:
    chosen = [row for row in rows if row["table"] == "baselines" and row["phase"] == "both"]
    columns = [
        ("pairs/token", lambda members: f"{mean(members, 'prompt', 'pairs_per_token'):.0f}"),
        perplexities("prompt"),
        cost(paired, "prompt"),
        perplexities("continuation"),
        cost(paired, "continuation"),
        accuracy(paired, "continuation"),
    ]
    peaks = [f"{mean(chosen[:1], part, 'peak'):.2f} ({part})" for part in ("prompt", "continuation")]
    return [
        "## Without capacity\n",
        "And what every token loses or gains with another number of experts, renormalised: the price of pairs that are "
        f"taken without any choice. Peaks of dropless: {', '.join(peaks)}.\n",
        table(chosen, ("method",), columns),
    ]


def _main(rows: Rows, paired: Paired) -> list[str]:
    text = [
        "![perplexity over pairs per token](pairs.svg)\n",
        "![added loss over gate mass lost and peak load](causes.svg)\n",
    ]
    for keep_best in (True, False):
        name = "a token's best pair is kept (the default)" if keep_best else "no pair is protected (the paper)"
        for phase in ("prefill", "both"):
            chosen = [
                row
                for row in rows
                if row["table"] == "main" and row["phase"] == phase and row["keep_best"] == keep_best
            ]
            what = (
                "prompts capped; shares are those of the prompts"
                if phase == "prefill"
                else ("decoding capped too; shares are those of the decoded tokens, the prompts' stand above")
            )
            columns = _prefill_columns(paired) if phase == "prefill" else _both_columns(paired)
            text += [f"## {phase}: {name}\n", f"{what}.\n", table(chosen, ("method", "factor"), columns)]
    return text


def _methods(rows: Rows, paired: Paired) -> list[str]:
    """Every method minus drop by score."""
    text = ["## Methods against drop by score\n", "Nats per token more than `drop by score` with the same γ.\n"]
    for keep_best in (True, False):
        for phase, part in (("prefill", "prompt"), ("both", "continuation")):
            chosen = [
                row
                for row in rows
                if row["table"] == "main" and row["phase"] == phase and row["keep_best"] == keep_best
            ]
            by_point = group(chosen, ("method", "factor"))
            factors = list(dict.fromkeys(factor for _, factor in by_point))
            base = {factor: Paired(by_point["drop by score", factor]) for factor in factors}
            lines = [
                [method, *(base[factor].cell(by_point[method, factor], part) for factor in factors)]
                for method in dict.fromkeys(method for method, _ in by_point)
                if method != "drop by score"
            ]
            text += [
                f"Phase {phase}, {part}s, {'best pair kept' if keep_best else 'no pair protected'}:\n",
                markdown(["method", *(f"γ = {factor}" for factor in factors)], lines),
            ]
    return text


def _extra(name: str, title: str, what: str, keys: tuple[str, ...]) -> Callable[[Rows, Paired], list[str]]:
    def section(rows: Rows, paired: Paired) -> list[str]:
        text = [f"## {title}\n", what + "\n"]
        for phase, columns in (("prefill", _prefill_columns(paired)), ("both", _both_columns(paired))):
            chosen = [row for row in rows if row["table"] == name and row["phase"] == phase]
            text += [f"Phase {phase}:\n", table(chosen, keys, columns)]
        return text

    return section


def _sizes(rows: Rows, paired: Paired) -> list[str]:
    """With the rows of `main` at the size that all other tables have."""

    def chosen(phase: str, varied: str) -> list[Row]:
        usual = {"prefill_batch": 512, "decode_batch": 64}
        fixed = next(name for name in usual if name != varied)
        found = [
            row
            for row in rows
            if row["phase"] == phase and row["method"] in ("drop by score", "reroute") and row["keep_best"]
            if row["table"] == "sizes" or (row["table"] == "main" and row["factor"] in (1.0, 1.5))
            if row[fixed] == usual[fixed]
        ]
        return sorted(found, key=lambda row: (row["method"], row["factor"], row[varied]))

    prefill, both = chosen("prefill", "prefill_batch"), chosen("both", "decode_batch")
    return [
        "## The size of micro-batches\n",
        "A prefill micro-batch of 32 tokens is a quarter of one prompt, 128 is one prompt, 512 are four.\n",
        table(prefill, ("method", "factor", "prefill_batch"), _prefill_columns(paired)),
        "Phase both, prompts in micro-batches of 512:\n",
        table(both, ("method", "factor", "decode_batch"), _both_columns(paired)),
    ]


def _substitution(layers: Sequence[Row]) -> list[str]:
    """Of one dropless pass."""
    if not layers:
        return []
    names = [name for name in layers[0] if name != "layer"]
    lines = [[name, *(row[name] for row in layers), f"{np.mean([row[name] for row in layers]):.3f}"] for name in names]
    return [
        "## What stands in for a lost pair\n",
        "Squared error of a layer's expert output, over its squared norm, if every token loses that pair in this layer "
        "alone.\n",
        markdown(["", *(f"layer {row['layer']}" for row in layers), "mean"], lines),
    ]


SECTIONS: tuple[Callable[[Rows, Paired], list[str]], ...] = (
    _baselines,
    _main,
    _methods,
    _sizes,
    _extra("device", "One cap per device", "Four devices of four experts; best pairs kept.", ("method", "factor")),
    _extra(
        "local",
        "What expanded drop may add",
        "`source`: a micro-batch lives on one device, whose experts all its tokens may add, as in the paper's text; "
        "`all`: every token may add every expert, as in its published code. No pair is protected. Compare with `own` "
        "in the tables above.",
        ("local", "method", "factor"),
    ),
    _extra(
        "weights",
        "Weights that are not renormalised",
        "The same decisions as above, but weights stay over the gate mass that the token's top-k had: what is dropped "
        "is missing from the sum.",
        ("method", "factor", "keep_best"),
    ),
)

"""The words and tables of the evaluation report, and its heat map."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from amoe.builtin.train.heatmap import Panel, render

Floats = NDArray[np.float64]
HEAT_PEAK = 4.0  # times the mean load


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: first column left, the others right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows)) + "\n"


def header(date: str, python: str, notes: str) -> str:
    """Title, how to repeat it, and what the author adds."""
    return (
        "# The built-in model: quality and routing\n\n"
        f"{date}, `python -m amoe.builtin.train.evaluate`, {python}. The held-out text is that of the running\n"
        "interpreter's standard library, so another version shifts the figures a little. Nothing below depends on the\n"
        "speed of the machine.\n\n"
        f"{notes.strip()}\n"
    )


def perplexity(losses: dict[str, float], num_tokens: int, num_bytes: int, lzma_bits: float) -> str:
    """Loss, perplexity and bits per byte of the model and of the baselines, on all the held-out text."""
    rows = [
        (name, f"{loss:.3f}", f"{math.exp(loss):.2f}", f"{loss * num_tokens / math.log(2) / num_bytes:.3f}")
        for name, loss in losses.items()
    ]
    rows.append(("`lzma -9e` of the held-out text alone", "", "", f"{lzma_bits:.3f}"))
    return (
        "## Held-out perplexity\n\n"
        f"{num_tokens} tokens, {num_bytes} bytes ({num_bytes / num_tokens:.2f} bytes a token), each token scored\n"
        "once, in windows without overlap, so early tokens of a window have little context.\n\n"
        + table(("on the whole held-out text", "nats/token", "perplexity", "bits/byte"), rows)
    )


def by_split(splits: Sequence[tuple[str, int, int, float]]) -> str:
    """The same for code and prose apart: (name, tokens, bytes, nats a token)."""
    rows = [
        (name, str(n), f"{loss:.3f}", f"{math.exp(loss):.2f}", f"{loss * n / math.log(2) / size:.3f}")
        for name, n, size, loss in splits
    ]
    return table(("split, context 1024", "tokens", "nats/token", "perplexity", "bits/byte"), rows)


def skew(
    columns: dict[str, Floats], floors: Sequence[float], batches: dict[int, Floats], batch_floors: Sequence[float]
) -> str:
    """Hottest expert over mean, per layer: over a whole split, and in batches of the size of a decode step."""
    batch_names = [f"batch of {size}" for size in batches]
    values = [*columns.values(), *batches.values()]
    rows = [[str(layer), *(f"{column[layer]:.2f}" for column in values)] for layer in range(len(values[0]))]
    blanks = [""] * (len(columns) - len(floors))
    rows.append(["uniform routing", *(f"{f:.2f}" for f in floors), *blanks, *(f"{f:.2f}" for f in batch_floors)])
    return (
        "## Load skew per layer\n\n"
        "Pairs of the hottest expert over the mean of the 16. The last row is what a router that chooses uniformly at\n"
        "random would show on as many tokens (the sampling floor). A batch is that many tokens drawn from all the\n"
        "held-out text, as in a decode step of unrelated sequences; mean of 200.\n\n"
        + table(
            ["layer", *(f"max/mean, {name}" if "cold" not in name else name for name in columns), *batch_names], rows
        )
    )


def ablations(trained: float, rows: dict[str, float], single: Sequence[float]) -> str:
    """What the trained routing is worth."""
    body = [("trained router", f"{trained:.3f}", f"{math.exp(trained):.2f}", "")]
    body += [(name, f"{x:.3f}", f"{math.exp(x):.2f}", f"+{x - trained:.3f}") for name, x in rows.items()]
    layers = ", ".join(f"{layer}: +{x - trained:.2f}" for layer, x in enumerate(single))
    return (
        "## Have the routers specialised?\n\n"
        "Held-out loss, on every fourth window, when something else than the trained router chooses the experts (gate\n"
        "weights as they were):\n\n"
        + table(("experts chosen by", "nats/token", "perplexity", "loss added"), body)
        + f"\nTwo experts at random in one layer only, loss added by layer: {layers}.\n"
    )


def classes(of_token: Floats, control: Floats, of_next: Floats, next_control: Floats) -> str:
    """Mutual information of expert and token class."""
    columns = (of_token, control, of_next, next_control)
    rows = [[str(layer), *(f"{column[layer]:.4f}" for column in columns)] for layer in range(len(of_token))]
    return (
        "Normalised mutual information (0: independent, 1: the same partition) between a token's first-choice expert\n"
        "and its class in Python's eyes (keyword, identifier, number, operator, string, docstring, comment, space),\n"
        "on held-out code; and with the class of the *next* token. Control: labels permuted.\n\n"
        + table(("layer", "class of the token", "permuted", "class of the next token", "permuted"), rows)
    )


def domains(size: int, jaccard: Floats, jaccard_control: Floats, moved: Floats, moved_control: Floats) -> str:
    """Do code and prose use different experts?"""
    columns = (jaccard, jaccard_control, moved, moved_control)
    rows = [[str(layer), *(f"{column[layer]:.2f}" for column in columns)] for layer in range(len(jaccard))]
    head = ("layer", "Jaccard, code / prose", "code / other code", "load that moves, code / prose", "code / other code")
    return (
        f"Hot sets (the {size} hottest experts of a layer): overlap between code and prose, against that of two\n"
        "halves of the held-out code (different modules, same domain). Load that moves: half the summed difference of\n"
        "the expert shares.\n\n" + table(head, rows) + "\n![Load of each expert over the mean](HEATMAP)\n"
    )


def completions(samples: Sequence[tuple[str, str]]) -> str:
    """Greedy continuations, marked where the model takes over."""
    blocks = [f"```python\n{prompt}«{text}»\n```\n" for prompt, text in samples]
    return "## Greedy completions\n\nThe model's text stands between « and ». 64 tokens each.\n\n" + "\n".join(blocks)


def heatmap(splits: Sequence[tuple[str, Floats]], layer: int, by_class: Floats, names: Sequence[str]) -> str:
    """Load over mean: layer by expert for each split; class by expert for the layer that tells classes best apart."""
    experts = by_class.shape[1]
    panels = [
        Panel(f"load / mean by layer: {name}", [f"layer {i}" for i in range(len(shares))], shares * experts)
        for name, shares in splits
    ]
    panels.append(Panel(f"load / mean by token class: layer {layer}", list(names), by_class * experts))
    return render(panels, HEAT_PEAK)

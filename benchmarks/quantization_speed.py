"""How much faster int8 weights are: `python -m benchmarks.quantization_speed MODEL`, of `benchmarks.make_checkpoint`.

The native model in bfloat16 and in int8, both in this process, take turns in rounds: decode steps of a batch and whole
prompts (with logits for every token), through the same blocks in the same order as in the engine, without the engine.
Medians, and the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from amoe.bench.report import memory_bandwidth
from amoe.clock import MonotonicClock
from amoe.config import QUANTIZATIONS
from amoe.errors import AmoeError
from amoe.kernels.native import make_context
from amoe.models.config import load_model_config
from amoe.models.loader import load_native_model
from amoe.models.model import Blocks
from amoe.models.native_model import NativeModel
from benchmarks.capacity_quality.forward import Forward, Rows
from benchmarks.quantization_quality import as_routed

INT8 = QUANTIZATIONS[0]
STEPS = 6  # in a row, of a variant in a round; the first one does not count


class Load(NamedTuple):
    """`sequences` that decode after `context` tokens, or prompts of `prompt` tokens."""

    name: str
    sequences: int
    context: int = 0
    prompt: int = 0


LOADS = (
    *(Load(f"decode, batch {n}", n, context=96) for n in (1, 8, 32, 64)),
    Load("prompt of 512", 1, prompt=512),
    Load("32 prompts of 64", 32, prompt=64),
)


def main() -> int:
    """Measure and write the report. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantization_speed", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/2026-11-22-quantization-speed.md"))
    args = parser.parse_args()
    try:
        models = {name: load(args.model, args.threads, name) for name in ("bf16", INT8)}
    except AmoeError as error:
        parser.error(str(error))
    torch.set_num_threads(1)  # torch's threads would spin beside those of the kernels
    lines = [
        "# How much faster int8 weights are, 2026-11-22",
        "",
        f"    python -m benchmarks.quantization_speed MODEL --threads {args.threads}",
        "",
        f"{args.threads} threads. Weights: {' and '.join(weights_of(models))}. Tokens per second.",
        "",
        "| load | bf16 | int8 | int8 / bf16 | probe GB/s |",
        "|---|---|---|---|---|",
    ]
    with torch.inference_mode():
        lines += [row(models, kind, args.rounds, args.threads) for kind in LOADS]
    report = "\n".join(lines) + "\n"
    args.out.write_text(report, encoding="utf-8")
    print(report)
    return 0


def load(path: Path, num_threads: int, name: str) -> NativeModel:
    """The whole model.

    Raises:
        AmoeError: it cannot be had.
    """
    config, context = load_model_config(path), make_context(torch.bfloat16, num_threads)
    return load_native_model(path, config, Blocks.whole(config), context, dtype=torch.bfloat16, quantize=name == INT8)


def weights_of(models: dict[str, NativeModel]) -> list[str]:
    return [f"{model.parameter_bytes / 1e9:.2f} GB ({name})" for name, model in models.items()]


def row(models: dict[str, NativeModel], load: Load, rounds: int, num_threads: int) -> str:
    """The cells of one load."""
    speeds: dict[str, list[float]] = {name: [] for name in models}
    bandwidths = []
    for number in range(rounds):
        bandwidths.append(memory_bandwidth(MonotonicClock(), num_threads))
        for name in list(models) if number % 2 == 0 else reversed(list(models)):
            speeds[name].append(speed(models[name], load))
    ratio = statistics.median(fast / slow for fast, slow in zip(speeds[INT8], speeds["bf16"], strict=True))
    cells = [load.name, *(f"{statistics.median(found):.0f}" for found in speeds.values()), f"{ratio:.2f}"]
    return f"| {' | '.join(cells)} | {statistics.median(bandwidths) / 1e9:.0f} |"


def speed(model: NativeModel, load: Load) -> float:
    """Tokens per second, of the median step."""
    length = load.prompt or load.context
    forward, seconds = Forward(model, load.sequences, length), []
    steps = [rows_of(load, number) for number in range(STEPS if load.context else 2)]
    for rows in steps:
        tokens = torch.randint(0, model.config.vocab_size, (len(rows.sequences),))
        start = time.perf_counter()
        model.argmax(forward.step(tokens, rows, as_routed))
        seconds.append(time.perf_counter() - start)
    return len(steps[0].sequences) / statistics.median(seconds[1:])


def rows_of(load: Load, number: int) -> Rows:
    """The tokens of a step."""
    if load.prompt:
        sequences = np.repeat(np.arange(load.sequences), load.prompt)
        return Rows(sequences, np.tile(np.arange(load.prompt), load.sequences), True, number)
    return Rows(np.arange(load.sequences), np.full(load.sequences, load.context - 1), False, number)


if __name__ == "__main__":
    raise SystemExit(main())

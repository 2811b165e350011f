"""How the time of a step grows with the batch, the context and the number of experts, beside the roofline.

    python -m benchmarks.growth [--rounds N] [--cache DIR] [--amoe-flags FLAGS] [--out DIR]

The engine without HTTP, in its own worker processes (`benchmarks.peers.drivers.amoe_driver`), all sequences decoding:

- batch 1 to 256: OLMoE's shape, 1.341 B parameters (`benchmarks.make_checkpoint`), prompts of 64;
- context 64 to 3,968: the same model, 4 sequences;
- experts 8 to 128 per layer, four of them per token: hidden 512, 8 layers, expert width 256, 32 sequences.

A step is the time between two tokens of a sequence. The roofline is that of `benchmarks.peers`: bytes of the step over
the bandwidth that was measured just before (or operations over peak), so what is left is the engine's own. Points of a
sweep are measured in turn, in every other round backwards; medians. A cliff is a step that grows much more between two
neighbours than the roofline does: each is marked.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from amoe.bench.report import Machine as Host
from amoe.bench.report import memory_bandwidth, write_json
from amoe.clock import MonotonicClock
from amoe.errors import AmoeError
from amoe.models.config import ModelConfig, load_model_config
from benchmarks.make_checkpoint import SIZES, Shape, make_checkpoint
from benchmarks.peers.process import end_like_an_error
from benchmarks.peers.roofline import Machine, measured_peak, step_cost
from benchmarks.peers.setup import default_cache, positive
from benchmarks.peers.systems import WARMUP, DrivenSystem
from benchmarks.peers.timing import Point

BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
CONTEXTS = (64, 128, 256, 512, 1024, 2048, 3072, 3968)
EXPERTS = (8, 16, 32, 64, 128)
OUTPUT_LEN = 48
LONG_OUTPUT_LEN = 128  # prompts that take many steps one after another: the first must not end before the last begins
CLIFF = 1.35  # more than that between neighbours, beyond the roofline's growth


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """One curve; `models[i]`, a shape by its directory's name, runs `points[i]`, which stands at `places[i]`."""

    title: str
    unit: str
    places: Sequence[int]
    models: Sequence[str]
    points: Sequence[Point]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One measurement.

    Attributes:
        step_s, roofline_s: of a decode step.
        prefill_rate: prompt tokens per second.
        memory_bandwidth: bytes per second.
    """

    sweep: str
    place: int
    round: int
    step_s: float
    roofline_s: float
    prefill_rate: float
    memory_bandwidth: float


def sweeps() -> list[Sweep]:
    """The three."""
    many = [Point(batch, 64, OUTPUT_LEN) for batch in BATCHES]
    long = [Point(4, context, LONG_OUTPUT_LEN) for context in CONTEXTS]
    wide = [Point(32, 64, OUTPUT_LEN)] * len(EXPERTS)
    return [
        Sweep(title="batch", unit="sequences", places=BATCHES, models=["full"] * len(many), points=many),
        Sweep(title="context", unit="tokens", places=CONTEXTS, models=["full"] * len(long), points=long),
        Sweep(
            title="experts",
            unit="experts per layer",
            places=EXPERTS,
            models=[f"small-{number}-experts" for number in EXPERTS],
            points=wide,
        ),
    ]


def shape_of(model: str) -> Shape:
    """`full`, or `small-N-experts`."""
    if model == "full":
        return SIZES["full"]
    return replace(SIZES["small"], num_experts=int(model.split("-")[1]))


class Growth:
    """Measures sweeps.

    Args:
        models: directory of the checkpoints, made where they are missing.
        peak: operations per second.
    """

    def __init__(self, models: Path, amoe_flags: Sequence[str], *, threads: int, peak: float) -> None:
        self._models = models
        self._flags = ["--kv-cache-memory-bytes", "3G", "--threads-per-worker", str(threads), *amoe_flags]
        self._threads = threads
        self._peak = peak
        self._clock = MonotonicClock()
        self.steps: list[Step] = []

    def run(self, sweep: Sweep, number: int) -> None:
        """One round of a sweep.

        Raises:
            AmoeError: the engine failed.
        """
        order = range(len(sweep.points))
        system: DrivenSystem | None = None
        loaded = ""
        try:
            for index in order if number % 2 == 0 else reversed(order):
                if system is None or sweep.models[index] != loaded:
                    if system is not None:
                        system.stop()
                    loaded = sweep.models[index]
                    system, config = self._load(loaded)
                self._measure(system, config, sweep, index, number)
        finally:
            if system is not None:
                system.stop()

    def _load(self, model: str) -> tuple[DrivenSystem, ModelConfig]:
        directory = self._models / ("olmoe-1.3b" if model == "full" else model)
        if not (directory / "config.json").exists():
            make_checkpoint(directory, shape_of(model))
        config = load_model_config(str(directory))
        command = [sys.executable, "-m", "benchmarks.peers.drivers.amoe_driver", *self._flags, str(directory)]
        warmup = WARMUP.prompts(np.random.default_rng(0), config.vocab_size)
        system = DrivenSystem("amoe", command, {}, self._models / "amoe-driver.log", warmup, tells_shares=True)
        system.start()
        return system, config

    def _measure(self, system: DrivenSystem, config: ModelConfig, sweep: Sweep, index: int, number: int) -> None:
        point = sweep.points[index]
        prompts = point.prompts(np.random.default_rng((number, *point.key)), config.vocab_size)
        bandwidth = memory_bandwidth(self._clock, self._threads)
        timing = system.run(point, prompts)
        cost = step_cost(
            config,
            num_tokens=point.batch,
            context=point.input_len + point.output_len / 2,
            shares=system.tell_shares(),
            num_logits=point.batch,
        )
        step = Step(
            sweep=sweep.title,
            place=sweep.places[index],
            round=number,
            step_s=point.batch / timing.decode_rate,
            roofline_s=cost.seconds(Machine(bandwidth=bandwidth, peak=self._peak)),
            prefill_rate=timing.prefill_rate,
            memory_bandwidth=bandwidth,
        )
        self.steps.append(step)
        print(
            f"round {number + 1}: {sweep.title} {step.place}: {step.step_s * 1e3:.2f} ms per step, roofline "
            f"{step.roofline_s * 1e3:.2f}, prefill {step.prefill_rate:.0f} tok/s, {bandwidth / 1e9:.0f} GB/s",
            file=sys.stderr,
            flush=True,
        )


@dataclass(frozen=True, slots=True)
class Middle:
    """Medians at a place: milliseconds of a step, and of the roofline's; prefill in tokens per second."""

    place: int
    step_ms: float
    roofline_ms: float
    prefill_rate: float


def middles(steps: Sequence[Step], sweep: str) -> list[Middle]:
    """Of a sweep, ascending."""
    found = []
    for place in sorted({step.place for step in steps if step.sweep == sweep}):
        mine = [step for step in steps if (step.sweep, step.place) == (sweep, place)]
        found.append(
            Middle(
                place,
                float(np.median([step.step_s for step in mine])) * 1e3,
                float(np.median([step.roofline_s for step in mine])) * 1e3,
                float(np.median([step.prefill_rate for step in mine])),
            )
        )
    return found


def cliffs(line: Sequence[Middle]) -> set[int]:
    """Places where the step has grown more than `CLIFF` times as much as the roofline since the place before."""
    return {
        after.place
        for before, after in pairwise(line)
        if after.step_ms / before.step_ms > CLIFF * after.roofline_ms / before.roofline_ms
    }


def report(steps: Sequence[Step], chosen: Sequence[Sweep]) -> str:
    """A table for each sweep, in Markdown."""
    parts = []
    for sweep in chosen:
        line = middles(steps, sweep.title)
        marked = cliffs(line)
        parts.append(
            f"| {sweep.unit} | step ms | roofline ms | of the roofline | prefill tok/s | |\n|---|---|---|---|---|---|"
        )
        for m in line:
            share = m.roofline_ms / m.step_ms
            mark = "cliff" if m.place in marked else ""
            cells = (
                f"{m.place:,}",
                f"{m.step_ms:.2f}",
                f"{m.roofline_ms:.2f}",
                f"{share:.0%}",
                f"{m.prefill_rate:,.0f}",
            )
            parts.append("| " + " | ".join((*cells, mark)) + " |")
        parts.append("")
    return "\n".join(parts)


def plot(steps: Sequence[Step], chosen: Sequence[Sweep], path: Path) -> None:
    """A panel for each sweep: the step and its roofline."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(chosen), figsize=(4.2 * len(chosen), 3.6), squeeze=False, layout="constrained")
    for axis, sweep in zip(axes[0], chosen, strict=True):
        line = middles(steps, sweep.title)
        places = [m.place for m in line]
        mine = [step for step in steps if step.sweep == sweep.title]
        axis.plot([s.place for s in mine], [s.step_s * 1e3 for s in mine], ".", color="#c03020", alpha=0.35)
        axis.plot(places, [m.step_ms for m in line], "-", color="#c03020", label="a step")
        axis.plot(places, [m.roofline_ms for m in line], "--", color="0.4", label="roofline")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(places[:: max(1, len(places) // 6)], [str(p) for p in places[:: max(1, len(places) // 6)]])
        low, high = axis.get_ylim()
        ticks = [2.0**power for power in range(-3, 12) if low <= 2.0**power <= high]
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel(sweep.unit)
        axis.set_ylabel("ms")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write `growth.md`, `growth.png` and `growth.json`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=positive, default=3, help="(default %(default)s)")
    parser.add_argument("--sweeps", default="batch,context,experts", help="(default %(default)s)")
    parser.add_argument("--cache", type=Path, default=default_cache(), metavar="DIR", help="of models (%(default)s)")
    parser.add_argument("--threads", type=positive, default=2, metavar="N", help="(default %(default)s)")
    parser.add_argument("--amoe-flags", default="", metavar="FLAGS", help="of `amoe serve`, besides")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/growth"), metavar="DIR")
    args = parser.parse_args(argv)
    asked = args.sweeps.split(",")
    chosen = [sweep for sweep in sweeps() if sweep.title in asked]
    if len(chosen) < len(asked):
        parser.error(f"--sweeps {args.sweeps}: must be of batch, context, experts")
    end_like_an_error(signal.SIGTERM)
    args.cache.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    growth = Growth(args.cache, args.amoe_flags.split(), threads=args.threads, peak=measured_peak(args.threads))
    try:
        for number in range(args.rounds):
            for sweep in chosen:
                growth.run(sweep, number)
    except AmoeError as error:
        sys.exit(f"error: {error}")
    finally:
        _write(args, growth.steps, chosen)


def _write(args: argparse.Namespace, steps: Sequence[Step], chosen: Sequence[Sweep]) -> None:
    text = report(steps, chosen)
    print(text)
    (args.out / "growth.md").write_text(text, encoding="utf-8")
    shown: dict[str, Any] = {key: str(value) for key, value in vars(args).items()}
    results = {"steps": [asdict(step) for step in steps]}
    write_json(args.out / "growth.json", "growth", shown, Host.here(MonotonicClock()), results)
    plot(steps, chosen, args.out / "growth.png")


if __name__ == "__main__":
    main()

"""The native kernels beside torch's and the roofline of the machine: `python -m benchmarks.kernels [--threads 2]`.

Products with packed weights and the experts of a layer, in the shapes of `benchmarks.make_checkpoint`'s model, at 1 to
2048 tokens, with weights that no cache holds. Implementations take turns in rounds; each round probes the memory's
bandwidth with the same threads, and the share of the roofline is taken within a round. The roofline is the larger of
the bytes of the weights over that bandwidth, and of the operations over the peak of a large product by torch.
Attention has a benchmark of its own, `benchmarks.kernels_attention`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.progress import track

from amoe.bench.report import memory_bandwidth
from amoe.clock import MonotonicClock
from amoe.kernels.native import _native, choose_isa, make_context
from benchmarks.kernels_products import OURS, Call, Case, ExpertsShape, experts_cases, linear_cases, small_calls
from benchmarks.peers.roofline import measured_peak

TOKENS = (1, 8, 32, 64, 256, 2048)
EXPERTS = ExpertsShape(num_experts=32, top_k=4, hidden=1024, intermediate=768)
MATRICES = {"queries, keys and values": (3072, 1024, TOKENS), "LM head": (32000, 1024, TOKENS[:4])}
SMALL_TOKENS = (1, 64)
COLD_BYTES = 400 << 20  # of all copies of a matrix together
BLOCK_S = 0.05  # calls of one implementation in a row, in a round
MOST_CALLS = 30
PAUSE_S = 0.02  # so that the threads of one implementation have stopped spinning before the next one starts

Seconds = dict[str, list[float]]


def main() -> int:
    """Measure and write the report. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/2026-11-22-kernels.md"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    peak, context = measured_peak(args.threads), make_context(torch.bfloat16, args.threads)
    lines = heading(args.threads, peak)
    with torch.inference_mode():
        lines += ["", f"## Experts: {EXPERTS.num_experts}, top {EXPERTS.top_k}, of 1024 × 768", ""]
        lines += table(experts_cases(context, EXPERTS, TOKENS, copies=3), args.rounds, args.threads, peak)
        for name, (rows, depth, tokens) in MATRICES.items():
            cases = linear_cases(context, rows, depth, tokens, copies=COLD_BYTES // (2 * rows * depth))
            lines += ["", f"## A product: {name}, {rows} × {depth}", ""]
            lines += table(cases, args.rounds, args.threads, peak)
        lines += ["", "## What is small", "", *small_table(context, args.rounds)]
    report = "\n".join(lines) + "\n"
    args.out.write_text(report, encoding="utf-8")
    print(report)
    return 0


def heading(num_threads: int, peak: float) -> list[str]:
    """The top of the report."""
    return [
        "# The native kernels beside torch's and the roofline, 2026-11-22",
        "",
        "    python -m benchmarks.kernels",
        "",
        f"{num_threads} threads, instruction set {choose_isa()}, torch {torch.__version__}. Microseconds of a call,",
        "median of rounds; in brackets how many times as long as amoe's. Weights are bf16 (int8 where it says so), in",
        "no cache. *Roofline* is for bf16 weights: the larger of their bytes over the bandwidth probed in the same",
        f"round, and of the operations over {peak / 1e9:.0f} GFLOP/s, torch's for a product of 2048 × 2048 matrices.",
        "*Share* is the roofline over amoe's time.",
    ]


# ---- tables


def table(cases: Iterator[Case], rounds: int, num_threads: int, peak: float) -> list[str]:
    """A row for each case, a column for each implementation."""
    lines: list[str] = []
    for case in track(list(cases), description="cases", transient=True):
        if not lines:
            others = " | ".join(name for name in case.calls if name != OURS)
            lines += [
                f"| tokens | probe GB/s | roofline | amoe | share | {others} |",
                "|---" * (5 + len(case.calls) - 1) + "|",
            ]
        verify(case)
        seconds, bandwidths = measure(case.calls, rounds, num_threads)
        lines.append(row(case, seconds, bandwidths, peak))
    return lines


def row(case: Case, seconds: Seconds, bandwidths: list[float], peak: float) -> str:
    """The cells of a case. bandwidths: of each round."""
    floors = [max(case.weight_bytes / bandwidth, case.operations / peak) for bandwidth in bandwidths]
    share = statistics.median(floor / ours for floor, ours in zip(floors, seconds[OURS], strict=True))
    cells = [str(case.tokens), f"{statistics.median(bandwidths) / 1e9:.0f}", f"{statistics.median(floors) * 1e6:.0f}"]
    cells += [f"{statistics.median(seconds[OURS]) * 1e6:.0f}", f"{share:.0%}"]
    cells += [compared(seconds[name], seconds[OURS]) for name in case.calls if name != OURS]
    return f"| {' | '.join(cells)} |"


def compared(theirs: list[float], ours: list[float]) -> str:
    """Median microseconds, and the median of the rounds' ratios."""
    ratio = statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
    return f"{statistics.median(theirs) * 1e6:.0f} ({ratio:.2f})"


def small_table(context: _native.Context, rounds: int) -> list[str]:
    """Kernels whose time is mostly that of a call."""
    lines = ["| kernel | tokens | amoe | torch |", "|---|---|---|---|"]
    for n in SMALL_TOKENS:
        calls = small_calls(context, n, EXPERTS.hidden, EXPERTS.num_experts, EXPERTS.top_k, MATRICES["LM head"][0])
        for name, (ours, theirs) in calls.items():
            torch.testing.assert_close(ours(0), theirs(0), rtol=2e-2, atol=2e-2)
            seconds, _ = measure({OURS: ours, "torch": theirs}, rounds, 0)
            cells = [f"{statistics.median(seconds[OURS]) * 1e6:.1f}", compared(seconds["torch"], seconds[OURS])]
            lines.append(f"| {name} | {n} | {' | '.join(cells)} |")
    return lines


def verify(case: Case) -> None:
    """All implementations compute the same, as far as bf16 and int8 go."""
    expected = case.calls[OURS](0).float()
    for name, call in case.calls.items():
        error = (call(0).float() - expected).norm() / expected.norm()
        if not error < 0.02:
            raise AssertionError(f"{name} differs from {OURS} by {error:.1%} with {case.tokens} tokens")


# ---- timing


def measure(calls: dict[str, Call], rounds: int, num_threads: int) -> tuple[Seconds, list[float]]:
    """Seconds of a call by implementation, and bytes per second of memory (`num_threads` 0: not probed), by round."""
    seconds: Seconds = {name: [] for name in calls}
    bandwidths = []
    for number in range(rounds):
        if num_threads:
            bandwidths.append(memory_bandwidth(MonotonicClock(), num_threads))
        for name in list(calls) if number % 2 == 0 else reversed(list(calls)):
            seconds[name].append(block(calls[name]))
    return seconds, bandwidths


def block(call: Call) -> float:
    """Median seconds of some calls in a row; the first one, which wakes the threads, does not count."""
    time.sleep(PAUSE_S)
    start = time.perf_counter()
    call(0)
    count = max(3, min(MOST_CALLS, int(BLOCK_S / (time.perf_counter() - start))))
    seconds = []
    for number in range(1, count + 1):
        start = time.perf_counter()
        call(number)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    raise SystemExit(main())

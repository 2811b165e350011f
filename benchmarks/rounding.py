"""How often it matters who holds which experts: sums of a token's outputs by one worker, and by three.

    python -m benchmarks.rounding [--millions N]

Eight weighted outputs of experts, normal and log-normally weighted, are added to a residual of bfloat16: by one worker
in the order of the router, and by three that each add up some of them and send the sum home. Counted are the elements
that then differ in bfloat16, for three ways to round on the way: sums in bfloat16; sums in float32; each output in
bfloat16 and sums in float32, which is what the native kernels do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from rich.progress import track

TOP_K, CHUNK = 8, 1_000_000
ALONE = ((0, 1, 2, 3, 4, 5, 6, 7),)
APART = ((0, 5, 3), (7, 1), (2, 6, 4))
# Name, whether outputs are rounded, whether sums are.
WAYS = (
    ("sums in bfloat16", False, True),
    ("sums in float32", False, False),
    ("outputs in bfloat16, sums in float32", True, False),
)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """x, as bfloat16 has it."""
    return x.bfloat16().float()


def total(
    outputs: torch.Tensor, residual: torch.Tensor, holders: Sequence[Sequence[int]], *, rounds_sums: bool
) -> torch.Tensor:
    """[n] bfloat16: residual [n] and the outputs [K, n], of which each holder adds up its own first."""
    sums = torch.zeros_like(residual)
    for held in holders:
        part = torch.zeros_like(residual)
        for k in held:
            part = part + outputs[k]
        sums = sums + (rounded(part) if rounds_sums else part)
    return (sums + residual).bfloat16()


def draw(generator: torch.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted outputs [K, count] and residuals [count]."""
    weights = torch.randn(TOP_K, count, generator=generator).exp()
    outputs = 0.3 * weights / weights.sum(0) * torch.randn(TOP_K, count, generator=generator)
    return outputs, rounded(torch.randn(count, generator=generator))


def count_differences(millions: int) -> list[int]:
    """Elements that differ, by way."""
    generator, counts = torch.Generator().manual_seed(0), [0] * len(WAYS)
    for _ in track(range(millions), description="adding up", disable=not sys.stderr.isatty()):
        exact, residual = draw(generator, CHUNK)
        for number, (_, rounds_outputs, rounds_sums) in enumerate(WAYS):
            outputs = rounded(exact) if rounds_outputs else exact
            alone, apart = (total(outputs, residual, who, rounds_sums=rounds_sums) for who in (ALONE, APART))
            counts[number] += int((alone != apart).sum())
    return counts


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rounding", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--millions", type=int, default=24, help="of elements")
    millions = parser.parse_args(arguments).millions
    print(f"| rounding | elements of {millions},000,000 that differ |\n|---|---|")
    for (name, _, _), count in zip(WAYS, count_differences(millions), strict=True):
        print(f"| {name} | {count:,} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What users notice of workers that die, hang or are cut off, through `amoe serve` over HTTP.

    python -m benchmarks.chaos [--only TEXT] [--max-tokens N] [--json FILE] [--plot FILE.png]

A small random model in float32, on as many workers as a row says. 200 greedy and 40 sampled requests stream at once,
first undisturbed: what they get then is what they must get with every fault as well (requests that rounding could
change are left out, see `benchmarks.chaos.ties`). A fault comes when a third of the tokens have come. All rows of one
server are about the same requests, so prefixes of prompts may be cached.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.chaos.faults import Fault
from benchmarks.chaos.figures import figures
from benchmarks.chaos.report import Row, plot, table
from benchmarks.chaos.run import Run, run
from benchmarks.chaos.server import ChaosServer
from benchmarks.chaos.streams import Answer, Load, make_load
from benchmarks.chaos.ties import clear_requests
from tests.checkpoints import make_checkpoint

VOCAB_SIZE = 101
_MODEL: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
}
_QUIET = ("--uvicorn-log-level", "warning", "--disable-uvicorn-access-log")
_APART = ("--attention-workers", "2", "--expert-workers", "2")
_REPLICATED = (*_APART, "--redundant-experts", "8")
_ONE_HOME = ("--attention-workers", "1", "--expert-workers", "2")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """One server, and the runs on it."""

    name: str
    flags: tuple[str, ...]
    runs: tuple[tuple[Fault, ...], ...]


def _kill(*workers: str, at: float = 0.33) -> Fault:
    return Fault(kind="kill", workers=workers, at=at)


def _stop(*workers: str, at: float = 0.33) -> Fault:
    return Fault(kind="stop", workers=workers, at=at)


def _hang(*workers: str) -> Fault:
    return Fault(kind="hang", workers=workers, at=0.33)


def _cut(*workers: str) -> Fault:
    return Fault(kind="cut", workers=workers, at=0.33)


_ONE_OF_EACH = ((_kill("expert 0"),), (_stop("expert 1"),), (_cut("expert 0"),), (_kill("attention 0"),))


SCENARIOS = (
    Scenario(
        name="2 attention, 2 expert",
        flags=_APART,
        runs=(
            (_kill("expert 0"),),
            (_stop("expert 1"),),
            (_kill("attention 0"),),
            (_stop("attention 1"),),
            (_hang("expert 0"),),
            (_hang("attention 0"),),
            (_cut("expert 0"),),
            (_cut("attention 1"),),
            (Fault(kind="delay", workers=("expert 1",)),),
            (_kill("expert 0", "expert 1"),),
            (_kill("expert 0", "attention 1"),),
            (
                _kill("expert 0", at=0.2),
                _stop("expert 1", at=0.4),
                _kill("attention 0", at=0.6),
                _kill("expert 1", at=0.8),
            ),
        ),
    ),
    Scenario(
        name="2 attention, 2 expert, every expert twice",
        flags=_REPLICATED,
        runs=(
            (_kill("expert 0"),),
            (_stop("expert 0"),),
            (_cut("expert 0"),),
            (_kill("expert 1", "attention 0"),),
        ),
    ),
    Scenario(
        name="2 attention, 2 expert, `--warm-spare`", flags=(*_APART, "--warm-spare"), runs=((_kill("expert 0"),),)
    ),
    Scenario(name="1 attention, 2 expert", flags=_ONE_HOME, runs=((_kill("attention 0"),), (_kill("expert 1"),))),
    Scenario(name="2 colocated", flags=("--colocated", "2"), runs=((_kill("worker 0"),), (_stop("worker 1"),))),
    Scenario(
        name="1 attention, 2 expert, `--on-expert-loss reroute`",
        flags=(*_ONE_HOME, "--on-expert-loss", "reroute"),
        runs=((_kill("expert 0"),),),
    ),
    Scenario(
        name="1 worker that holds everything",
        flags=(),
        runs=((_kill("worker 0"),), (_stop("worker 0"),), (_hang("worker 0"),)),
    ),
    Scenario(
        name="2 attention, 2 expert, `--schedule progress`",
        flags=(*_APART, "--schedule", "progress"),
        runs=_ONE_OF_EACH,
    ),
    Scenario(name="2 attention, 2 expert, `--transport tcp`", flags=(*_APART, "--transport", "tcp"), runs=_ONE_OF_EACH),
    Scenario(
        name="2 attention, 2 expert, `--transport distributed`",
        flags=(*_APART, "--transport", "distributed"),
        runs=_ONE_OF_EACH,
    ),
)


def lost_pairs(answers: Sequence[Answer]) -> dict[str, float]:
    """Sums of what the usage of the answers tells of pairs that were not computed as they should."""
    sums: dict[str, float] = {}
    for answer in answers:
        for name, value in (answer.usage.get("capacity") or {}).items():
            if isinstance(value, int | float) and value:
                sums[name] = round(sums.get(name, 0.0) + value, 3)
    return sums


async def measure(scenario: Scenario, model: Path, wanted: Load, directory: Path) -> list[tuple[Row, Run]]:
    """All runs of a scenario, on one server."""
    rows = []
    with ChaosServer(directory, str(model), *scenario.flags, *_QUIET) as server:
        await run(server, replace(wanted, bodies=wanted.bodies[:40]))  # warms up
        load, oracle = clear_requests(model, wanted, (await run(server, wanted)).answers)
        load, oracle = _at_most(load, oracle, 200, 40)
        before = server.residue()
        for faults in scenario.runs:
            disturbed = await run(server, load, faults)
            after = server.residue()
            row = Row(
                server=scenario.name,
                faults=", then ".join(str(fault) for fault in faults),
                figures=figures(disturbed, oracle, load.max_tokens),
                leaks=server.leaks(before),
                memory_mib=(before.memory_mib, after.memory_mib),
                usage=lost_pairs(disturbed.answers),
            )
            print(table([row]).splitlines()[-1], file=sys.stderr, flush=True)
            for complaint in {answer.complaint(load.max_tokens) for answer in disturbed.answers} - {""}:
                print(f"  failed: {complaint}", file=sys.stderr, flush=True)
            rows.append((row, disturbed))
    return rows


def _at_most(load: Load, oracle: list[Answer], num_greedy: int, num_sampled: int) -> tuple[Load, list[Answer]]:
    greedy = [n for n, body in enumerate(load.bodies) if "seed" not in body][:num_greedy]
    sampled = [n for n, body in enumerate(load.bodies) if "seed" in body][:num_sampled]
    keep = greedy + sampled
    return replace(load, bodies=tuple(load.bodies[n] for n in keep)), [oracle[n] for n in keep]


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="servers of which the name contains this")
    parser.add_argument("--max-tokens", type=int, default=192)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    wanted = make_load(230, 70, args.max_tokens, VOCAB_SIZE)
    rows: list[tuple[Row, Run]] = []
    with tempfile.TemporaryDirectory() as directory:
        model = make_checkpoint(Path(directory) / "model", "qwen3_moe", vocab_size=VOCAB_SIZE, **_MODEL)
        for scenario in SCENARIOS:
            if args.only in scenario.name:
                rows += asyncio.run(measure(scenario, model, wanted, Path(directory)))
    print(table([row for row, _ in rows]))
    if args.plot is not None:
        plot(args.plot, [(f"{row.server}: {row.faults}", disturbed) for row, disturbed in rows])
    if args.json is not None:
        record = {
            "date": datetime.now(UTC).isoformat(),
            "command": sys.argv,
            "rows": [row.as_json() for row, _ in rows],
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

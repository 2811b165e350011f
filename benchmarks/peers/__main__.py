"""amoe beside its peers: the same model, prompts and threads, in interleaved rounds; tables, a plot, and all figures.

    python -m benchmarks.peers [--rounds N] [--systems amoe,vLLM,llama.cpp,transformers] [--parts offline,served,memory]
        [--vllm-python PATH] [--llama-server PATH --llama-converter PATH/convert_hf_to_gguf.py] [--out DIR]

Systems that are not installed are left out, and the report says how they would be there. The model is made on the first
run: OLMoE's shape, 1.341 B parameters, random weights in bf16, 2.68 GB (and as much again for llama.cpp).

Offline. `batch` prompts of 64 random tokens (or one of 512) are handed to the engine at once, and 64 tokens are
generated greedily after each, whatever they are. Every token is stamped when it is in the hands of the program that
asked for it; with T the moment at which every sequence has its first token,

- prefill: prompt tokens / (T - start), so it includes the sampling of the first tokens;
- decode: tokens that came from T until the first sequence has its last one / that time: all sequences decode, and
  nothing else happens; 63 tokens per sequence where all prompts are computed together;
- end to end: all generated tokens / (last token - start).

amoe: the engine as `amoe serve` runs it, workers in their own processes, without HTTP and detokenizer.
vLLM: the engine of its `LLM` class with the core in the same process, `step()` by hand, no detokenizer; threads bound,
tcmalloc and Intel's OpenMP preloaded where they are found, compiled.
transformers: `generate` with its grouped_mm experts; a streamer stamps each step.
llama.cpp: `llama-batched-bench`, which stamps the prompts' pass and 64 steps: random tokens, no sampling.
All: bf16, the same number of threads, 1 GiB of KV cache and up to 4,096 tokens per step, so that 64 prompts of 64 fit
into one (transformers: what they need), no prefix cache. Before every run as many threads read memory: the bandwidth of
a shared machine varies, and decoding with it.

Roofline. Bytes of a step (all dense weights, the experts that are hit, the cache) over the bandwidth, or its operations
over the peak of torch's bf16 matrix product, whichever takes longer. The experts hit follow from how often each was
chosen in this run. The bandwidth is the probes' median or best; "at that moment" is the probe before the run itself.

Served. As many streaming requests at once, by a client that only counts (raw sockets, events are not parsed; its CPU
time is told, it shares the cores). End to end: from the first request to the last answer's end. Memory: PSS and RSS
over all processes of a server, whose checkpoint had to come from storage.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from amoe.bench.report import Machine as Host
from amoe.bench.report import write_json
from amoe.clock import MonotonicClock
from amoe.errors import AmoeError
from amoe.models.config import load_model_config
from benchmarks.peers import plot, report
from benchmarks.peers.offline import OfflineRounds, systems_of
from benchmarks.peers.process import end_like_an_error
from benchmarks.peers.report import Results
from benchmarks.peers.roofline import Machine, measured_peak, uniform_shares
from benchmarks.peers.served import ServedRounds, footprint
from benchmarks.peers.servers import server_plans
from benchmarks.peers.setup import Setup, add_flags, positive, prepare
from benchmarks.peers.systems import DrivenSystem
from benchmarks.peers.timing import Point

_PARTS = ("offline", "served", "memory")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write `peers.md`, `peers.png` and `peers.json`."""
    args = _parse(argv)
    try:
        setup = prepare(args)
        for name, how in setup.missing.items():
            _note(f"{name} is not installed: {how}")
        end_like_an_error(signal.SIGTERM)
        _measure(args, setup)
    except AmoeError as error:
        sys.exit(f"error: {error}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser)
    parser.add_argument("--parts", type=_parts, default=_PARTS, metavar="A,B", help=f"of {', '.join(_PARTS)}")
    parser.add_argument("--rounds", type=positive, default=3, help="(default %(default)s)")
    parser.add_argument("--repeats", type=positive, default=2, help="runs of a point in a round (default %(default)s)")
    parser.add_argument("--batches", type=_numbers, default=(1, 8, 32, 64), metavar="1,8,...", help="at once")
    parser.add_argument("--input-len", type=positive, default=64, help="(default %(default)s)")
    parser.add_argument("--output-len", type=positive, default=64, help="(default %(default)s)")
    parser.add_argument("--prefill-len", type=positive, default=512, help="of a single prompt (default %(default)s)")
    parser.add_argument("--keep-loaded", action="store_true", help="all at once in memory: finer interleaving")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/peers"), metavar="DIR")
    return parser.parse_args(argv)


def _parts(text: str) -> tuple[str, ...]:
    parts = tuple(text.split(","))
    if set(parts) - set(_PARTS):
        raise argparse.ArgumentTypeError(f"must be of {', '.join(_PARTS)}")
    return parts


def _numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(number) for number in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 1,8,32")
    return numbers


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _measure(args: argparse.Namespace, setup: Setup) -> None:
    config = load_model_config(str(setup.model))
    points = [Point(batch, args.input_len, args.output_len) for batch in args.batches]
    results = Results(
        config=config,
        decode_points=points,
        prefill_points=[Point(1, args.prefill_len, 2)],
        machine=Machine(bandwidth=float("nan"), peak=measured_peak(setup.threads)),
        best_bandwidth=float("nan"),
        shares=uniform_shares(config),
        missing=setup.missing,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        if "offline" in args.parts:
            _run_offline(args, setup, results)
        if "served" in args.parts:
            _run_served(args, setup, results)
        if "memory" in args.parts:
            for number in range(args.rounds):
                for plan in server_plans(setup, args.systems, max(args.batches)):
                    _note(f"round {number + 1}: {plan.name}, memory and start")
                    results.footprints.append(footprint(plan, points[-1], config.vocab_size))
    finally:
        # The best of two, far apart: others on the machine take of it.
        results.machine = replace(results.machine, peak=max(results.machine.peak, measured_peak(setup.threads)))
        _write(args, results)  # what was measured until then


def _run_offline(args: argparse.Namespace, setup: Setup, results: Results) -> None:
    systems = systems_of(setup, args.systems, results.config.vocab_size)
    rounds = OfflineRounds(
        systems,
        [*results.decode_points, *results.prefill_points],
        num_rounds=args.rounds,
        repeats=args.repeats,
        vocab_size=results.config.vocab_size,
        seed=args.seed,
        threads=setup.threads,
        keep_loaded=args.keep_loaded,
        note=_note,
    )
    results.offline = rounds.samples
    try:
        rounds.run()
    finally:
        results.about = {system.name: system.about for system in systems}
        amoe = next((system for system in systems if isinstance(system, DrivenSystem) and system.shares), None)
        if amoe is not None:
            results.shares = amoe.shares


def _run_served(args: argparse.Namespace, setup: Setup, results: Results) -> None:
    rounds = ServedRounds(
        plans=server_plans(setup, args.systems, max(args.batches)),
        points=results.decode_points,
        num_rounds=args.rounds,
        repeats=args.repeats,
        vocab_size=results.config.vocab_size,
        seed=args.seed,
        threads=setup.threads,
        note=_note,
    )
    results.served = rounds.samples
    rounds.run()


def _write(args: argparse.Namespace, results: Results) -> None:
    probes = [run.memory_bandwidth for run in results.offline] + [run.memory_bandwidth for run in results.served]
    if probes:
        results.machine = Machine(bandwidth=float(np.median(probes)), peak=results.machine.peak)
        results.best_bandwidth = max(probes)
    text = report.markdown(results)
    print(text)
    (args.out / "peers.md").write_text(text, encoding="utf-8")
    write_json(args.out / "peers.json", "peers", _shown(args), Host.here(MonotonicClock()), _content(results))
    if results.offline:
        plot.plot(results, args.out / "peers.png")


def _shown(args: argparse.Namespace) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}


def _content(results: Results) -> dict[str, Any]:
    return {
        "peak_operations_per_s": results.machine.peak,
        "expert_shares": results.shares,
        "about": results.about,
        "missing": results.missing,
        "offline": [asdict(sample) for sample in results.offline],
        "served": [asdict(sample) for sample in results.served],
        "footprints": [asdict(item) for item in results.footprints],
    }


if __name__ == "__main__":
    main()

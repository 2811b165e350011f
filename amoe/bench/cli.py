"""`amoe bench serve` and `amoe bench offline`: flags, and what to do with them."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from amoe.bench import offline, serve
from amoe.bench.load import Progress
from amoe.bench.progress import ProgressDisplay
from amoe.bench.record import summarise
from amoe.bench.report import Machine, compare, print_comparison, print_figures, write_json
from amoe.bench.workload import (
    CHARS_PER_TOKEN,
    LengthRange,
    RequestSpec,
    make_requests,
    poisson_arrivals,
    random_prompts,
    standard_library_text,
    text_prompts,
)
from amoe.clock import MonotonicClock
from amoe.engine.expert_placement import write_expert_load
from amoe.engine.tokenizer import Tokenizer
from amoe.errors import ConfigError
from amoe.models.config import load_model_config
from amoe.server.engine_flags import add_engine_flags, engine_config
from amoe.server.placement_flags import settled
from amoe.types import SamplingParams

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130
FILE_WIDTH = 120  # columns where there is no terminal to ask


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `bench` to the command line. Its subcommands set `func(args) -> int`, the exit status."""
    bench = subparsers.add_parser("bench", help="measure a server, or the engine alone")
    commands = bench.add_subparsers(dest="bench_command", required=True, metavar="COMMAND")
    _add_serve(commands)
    _add_offline(commands)


def _add_workload(parser: argparse.ArgumentParser, num_prompts: int, input_len: int, output_len: int) -> None:
    group = parser.add_argument_group("requests")
    group.add_argument("--num-prompts", type=_positive, default=num_prompts, help="requests (default %(default)s)")
    group.add_argument("--input-len", type=_positive, default=input_len, help="prompt tokens (default %(default)s)")
    group.add_argument("--output-len", type=_positive, default=output_len, help="output tokens (default %(default)s)")
    group.add_argument(
        "--range-ratio", type=float, default=0.0, metavar="R", help="lengths uniform in [x(1-R), x(1+R)] (default 0)"
    )
    group.add_argument(
        "--dataset",
        choices=("random", "stdlib"),
        default="random",
        help="prompts of random token ids, or windows of the Python standard library (default random)",
    )
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="generate exactly as many tokens as asked for (default)",
    )
    group.add_argument("--warmup", type=int, default=None, metavar="W", help="requests before, not measured")
    group.add_argument("--seed", type=_seed, default=0, help="of prompts, lengths and arrivals (default 0)")
    parser.add_argument("--json", type=_report_file, metavar="FILE", help="write configuration and figures there")


def _add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("serve", help="measure a running server over HTTP")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", help="default: the first that the server lists")
    parser.add_argument("--api", choices=("completions",), default="completions", help="endpoint (streaming)")
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--request-rate", type=float, metavar="R", help="requests per second, Poisson arrivals")
    load.add_argument("--concurrency", type=_positive, metavar="C", help="requests under way (default 8)")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds without an answer (default %(default)g)")
    _add_workload(parser, num_prompts=64, input_len=128, output_len=64)
    parser.add_argument(
        "--vocab-size", type=_positive, default=4096, help="random token ids are below it (default %(default)s)"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="checkpoint whose tokenizer makes --dataset stdlib exact in length; without it, prompts are sent as text",
    )
    parser.set_defaults(func=run_serve)


def _add_offline(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("offline", help="measure the engine without HTTP, and compare schedules")
    parser.add_argument("--batch", type=_positive, metavar="B", help="requests under way (default: all)")
    _add_workload(parser, num_prompts=32, input_len=64, output_len=64)
    parser.add_argument(
        "--schedules",
        type=_variants,
        metavar="A,B,...",
        help="compare these, each in every round; waves:3 is 3 waves, lockstep:2 2 micro-batches (default: --schedule)",
    )
    parser.add_argument("--rounds", type=_positive, default=1, help="interleaved rounds (default 1)")
    parser.add_argument(
        "--save-expert-load",
        type=_report_file,
        metavar="FILE",
        help="write there how many pairs each expert has computed, for --expert-load",
    )
    add_engine_flags(parser)
    # Warm-up and rounds may meet a prompt again: a hit would measure the cache.
    parser.set_defaults(func=run_offline, enable_prefix_caching=False)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must be at least 0")
    return value


def _report_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():  # to be told before the measurement, not after it
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: no such directory, or it is one")
    return path


def _variants(text: str) -> list[offline.Variant]:
    try:
        variants = [offline.Variant.parse(name) for name in text.split(",")]
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if len(set(variants)) < len(variants):
        raise argparse.ArgumentTypeError("each schedule once")
    return variants


def run_serve(args: argparse.Namespace) -> int:
    """`amoe bench serve`. Returns the exit status: 0 if every request was answered. Raises `AmoeError`."""
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it has a line for every request
    return asyncio.run(_serve(args))


def run_offline(args: argparse.Namespace) -> int:
    """`amoe bench offline`. Returns the exit status: 0 if every request was answered. Raises `AmoeError`."""
    return asyncio.run(_offline(args))


async def _serve(args: argparse.Namespace) -> int:
    clock = MonotonicClock()
    async with serve.http_client(args.base_url, args.timeout) as http:
        card = await serve.choose_model(http, args.model)
        _check_length(args, card.get("max_model_len"))
        concurrency = args.concurrency or 8
        encode = Tokenizer(args.tokenizer).encode if args.tokenizer else None
        warmup, specs, rng = _requests(args, args.vocab_size, encode, default_warmup=concurrency)
        plan = serve.ServePlan(
            warmup=warmup,
            specs=specs,
            arrivals=() if args.request_rate is None else poisson_arrivals(rng, len(specs), args.request_rate).tolist(),
            concurrency=concurrency,
            body={
                "temperature": args.temperature,
                "top_p": args.top_p,
                "seed": args.seed,
                "ignore_eos": args.ignore_eos,
            },
        )
        progress = ProgressDisplay(Console(stderr=True), "requests", len(specs))
        result = await serve.measure(http, card["id"], plan, clock, progress)
    figures = summarise(result.records)
    load = f"concurrency {concurrency}" if args.request_rate is None else f"{args.request_rate:g} requests/s"
    print_figures(Console(), f"{card['id']} at {load}", figures)
    if args.json:
        # Of this machine, which need not be the server's: no probe of it.
        write_json(args.json, "serve", _config_of(args), None, asdict(figures))
    return _exit_status(figures.failed, result.interrupted)


async def _offline(args: argparse.Namespace) -> int:
    clock = MonotonicClock()
    args, where = settled(args)
    config = engine_config(args)
    vocab_size = load_model_config(config.model).vocab_size
    tokenizer = Tokenizer(config.model)
    _check_length(args, args.max_model_len)
    warmup, specs, _ = _requests(args, vocab_size, tokenizer.encode, default_warmup=4)
    plan = offline.OfflinePlan(
        warmup=warmup,
        specs=specs,
        concurrency=args.batch or len(specs),
        params=SamplingParams(temperature=args.temperature, top_p=args.top_p, ignore_eos=args.ignore_eos),
    )

    machine = Machine.here(clock)

    def make_progress(title: str) -> contextlib.AbstractContextManager[Progress]:
        return ProgressDisplay(Console(stderr=True), title, len(specs))

    alone = offline.Variant.of(config.scheduler)
    variants: list[offline.Variant] = args.schedules or [alone]
    measured: list[offline.Pairs] = []
    rounds = await offline.run_rounds(config, variants, args.rounds, plan, clock, make_progress, measured.append)
    if args.save_expert_load and measured:
        write_expert_load(args.save_expert_load, sum(measured, np.zeros((1, 1))))
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    if where:
        console.print(f"host: {where}")
    if len(rounds) == 1:
        print_figures(console, f"{config.model}, {rounds[0].variant}", rounds[0].figures)
    comparisons = compare(rounds) if rounds else []
    if len(rounds) > 1:
        print_comparison(console, comparisons, args.rounds)
    if rounds:
        bandwidths = [r.memory_bandwidth / 1e9 for r in rounds]
        console.print(f"memory bandwidth before the runs: {min(bandwidths):.1f} to {max(bandwidths):.1f} GB/s read")
        imbalances = [r.expert_imbalance for r in rounds if not np.isnan(r.expert_imbalance)]
        if imbalances:
            console.print(f"busiest expert of a layer: {np.mean(imbalances):.2f} times the mean")
    if args.json:
        results: dict[str, Any] = {
            "rounds": [asdict(r) for r in rounds],
            "comparison": [asdict(line) for line in comparisons],
        }
        write_json(args.json, "offline", _config_of(args), machine, results)
    failed = sum(r.figures.failed for r in rounds)
    return _exit_status(failed, len(rounds) < args.rounds * len(variants))


def _exit_status(num_failed: int, is_interrupted: bool) -> int:
    if is_interrupted:
        return EXIT_INTERRUPTED
    return EXIT_FAILED if num_failed else 0


def _config_of(args: argparse.Namespace) -> dict[str, Any]:
    kept = {key: value for key, value in vars(args).items() if key not in {"func", "json", "command"}}
    return {
        key: [str(item) for item in value]
        if isinstance(value, list)
        else str(value)
        if isinstance(value, Path)
        else value
        for key, value in kept.items()
    }


def _check_length(args: argparse.Namespace, max_model_len: int | None) -> None:
    longest = sum(LengthRange(mean=x, ratio=args.range_ratio).bounds[1] for x in (args.input_len, args.output_len))
    if max_model_len is not None and longest > max_model_len:
        raise ConfigError(
            f"--input-len and --output-len make sequences of up to {longest} tokens, "
            f"but the model's limit is {max_model_len}"
        )


def _requests(
    args: argparse.Namespace,
    vocab_size: int,
    encode: Callable[[str], Sequence[int]] | None,
    default_warmup: int,
) -> tuple[list[RequestSpec], list[RequestSpec], np.random.Generator]:
    """Requests of the warm-up and of the measurement, and the generator that goes on to the arrivals."""
    rng = np.random.default_rng(args.seed)
    num_warmup = default_warmup if args.warmup is None else max(0, args.warmup)
    output = LengthRange(mean=args.output_len, ratio=args.range_ratio)
    lengths = LengthRange(mean=args.input_len, ratio=args.range_ratio).draw(rng, num_warmup + args.num_prompts)
    prompts: list[list[int] | str]
    if args.dataset == "stdlib":
        num_chars = max(1_000_000, int(4 * lengths.max() * CHARS_PER_TOKEN))
        prompts = text_prompts(rng, lengths, standard_library_text(rng, num_chars), encode)
    else:
        prompts = list(random_prompts(rng, lengths, vocab_size))
    specs = make_requests(prompts, rng, output)
    return specs[:num_warmup], specs[num_warmup:], rng

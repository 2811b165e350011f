"""`amoe simulate`: flags, and what to do with them."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

from rich.console import Console

from amoe.config import CacheConfig, PlacementConfig, SchedulerConfig
from amoe.errors import ConfigError
from amoe.profiles.models import MODELS
from amoe.sim import options
from amoe.sim.config import HostModel, SimConfig, Window
from amoe.sim.flags import FILE_WIDTH, flags_of, known, real, report_file, whole
from amoe.sim.plan_plot import Point, check_plot, write_plot
from amoe.sim.replicas import ShareMode, read_loads, with_replicas
from amoe.sim.report import ProgressDisplay, print_results, print_workers, write_json
from amoe.sim.results import Results
from amoe.sim.simulator import Simulator
from amoe.sim.workload import Lengths, Workload

DEFAULT_DEVICES = 8
DEFAULT_CONCURRENCY = 256


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `simulate`; its parser sets `func(args) -> int`, the exit status."""
    parser = subparsers.add_parser(
        "simulate",
        help="simulate workers on devices that need not be there",
        description="Run the workers' scheduling, as it is, on modelled devices and links, in modelled time.",
    )
    parser.add_argument("model", metavar="MODEL", help=f"a checkpoint directory, or one of {', '.join(MODELS)}")
    _add_hardware(parser)
    _add_scheduling(parser)
    _add_workload(parser)
    parser.add_argument("--seed", type=whole(0), default=0, help="of routing, prompts and arrivals (default 0)")
    parser.add_argument("--json", type=report_file, metavar="FILE", help="write configuration and figures there")
    parser.add_argument(
        "--plot", type=report_file, metavar="FILE", help="tokens/s against ITL by schedule: *.svg, *.png or *.pdf"
    )
    parser.set_defaults(func=run_simulate)


def _add_hardware(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("devices")
    group.add_argument("--device", default="h100", metavar="NAME", help="profile, or *.json as measured (default h100)")
    group.add_argument("--devices", type=whole(1), metavar="N", help=f"colocated workers (default {DEFAULT_DEVICES})")
    group.add_argument("--colocated", type=whole(1), metavar="N", help="the same as --devices")
    group.add_argument("--attention-workers", type=whole(1), metavar="N", help="instead: workers that hold attention")
    group.add_argument("--expert-workers", type=whole(1), metavar="N", help="and workers that share the experts")
    group.add_argument("--fabric", metavar="NAME", help="links between devices (default: the device's)")
    group.add_argument("--devices-per-node", type=whole(1), default=8, metavar="N", help="(default 8)")
    group.add_argument("--link-latency-us", type=real(0), metavar="X", help="inside a node, instead of the fabric's")
    group.add_argument("--link-gbs", type=real(1e-6), metavar="X", help="gigabytes/s inside a node, likewise")
    group.add_argument("--host-us", type=real(0), metavar="X", help="microseconds of host time per step (default 0)")
    group.add_argument(
        "--host-mode",
        choices=("serial", "prelaunched", "queued"),
        default="serial",
        help="the device waits for it; only for what does not fit beside the step before; or not even when idle",
    )
    group.add_argument(
        "--slow", type=known(options.find_slowdown), action="append", default=[], metavar="RANK:FACTOR[@SECONDS]"
    )
    group.add_argument(
        "--stop", type=known(options.find_outage), action="append", default=[], metavar="RANK@START[-END]"
    )


def _add_scheduling(parser: argparse.ArgumentParser) -> None:
    base = SchedulerConfig()
    group = parser.add_argument_group("scheduling")
    group.add_argument(
        "--schedule", default="waves", metavar="A,B,...", help="one or more, such as progress, waves:2, lockstep:2"
    )
    group.add_argument(
        "--redundant-experts", type=whole(0), default=0, metavar="N", help="replicas per layer at each expert worker"
    )
    group.add_argument(
        "--expert-load", type=Path, metavar="FILE", help="loads that place replicas (default: those of --routing)"
    )
    group.add_argument(
        "--shares",
        choices=get_args(ShareMode),
        help="of replicas (default: planned in a closed loop, otherwise even)",
    )
    group.add_argument("--max-num-seqs", type=whole(1), metavar="N", help="per attention worker (default: enough)")
    group.add_argument(
        "--max-num-batched-tokens",
        type=whole(1),
        default=base.max_num_batched_tokens,
        metavar="N",
        help="prompt tokens",
    )
    group.add_argument("--block-size", type=whole(1), default=16, metavar="N", help="of the KV cache (default 16)")
    group.add_argument("--num-kv-blocks", type=whole(1), metavar="N", help="default: from the device's memory")


def _add_workload(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("requests")
    group.add_argument(
        "--routing", default="sigma=1.0", metavar="R", help=f"{options.ROUTING_HELP} (default sigma=1.0)"
    )
    load = group.add_mutually_exclusive_group()
    load.add_argument(
        "--concurrency", type=whole(1), metavar="C", help=f"sequences in a closed loop (default {DEFAULT_CONCURRENCY})"
    )
    load.add_argument("--request-rate", type=real(1e-9), metavar="R", help="requests per second, Poisson arrivals")
    group.add_argument("--num-requests", type=whole(1), metavar="N", help="no more than these (default: no end)")
    group.add_argument("--input-len", type=whole(1), default=128, metavar="N", help="prompt tokens (default 128)")
    group.add_argument("--output-len", type=whole(1), default=128, metavar="N", help="output tokens (default 128)")
    spread = group.add_mutually_exclusive_group()
    spread.add_argument("--range-ratio", type=real(0), metavar="R", help="lengths uniform in [x(1-R), x(1+R)]")
    spread.add_argument("--log-normal", type=real(0), metavar="S", help="lengths log-normal with this sigma")
    group.add_argument(
        "--context", type=whole(0), default=0, metavar="N", help="tokens of context without their prefill (default 0)"
    )
    group.add_argument(
        "--stagger",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the first sequences of a closed loop are under way already (default)",
    )
    length = group.add_mutually_exclusive_group()
    length.add_argument("--duration", type=real(1e-9), metavar="SECONDS", help="to measure, simulated (default 10)")
    length.add_argument(
        "--iterations",
        type=whole(1),
        metavar="N",
        help="to measure, of a closed loop: tokens per sequence (default 20)",
    )
    group.add_argument("--warmup", type=real(0), metavar="X", help="before it, in the same unit (default: half of it)")


# ---- what the flags make


def placement_of(args: argparse.Namespace) -> PlacementConfig:
    """Raises `ConfigError` where the flags contradict each other."""
    apart = (args.attention_workers, args.expert_workers)
    if args.colocated is not None and args.devices not in (None, args.colocated):
        raise ConfigError(f"--colocated {args.colocated} and --devices {args.devices} say the same thing differently")
    colocated = args.colocated or args.devices
    if apart == (None, None):
        return PlacementConfig(colocated=colocated or DEFAULT_DEVICES)
    if None in apart:
        raise ConfigError("--attention-workers and --expert-workers go together")
    if args.colocated is not None or args.devices not in (None, sum(apart)):
        raise ConfigError(
            f"--attention-workers and --expert-workers make {sum(apart)} devices: leave out --colocated and --devices"
        )
    return PlacementConfig(attention_workers=apart[0], expert_workers=apart[1])


def workload_of(args: argparse.Namespace) -> Workload:
    """Raises `ConfigError`."""

    def lengths(mean: int) -> Lengths:
        if args.range_ratio is not None:
            return Lengths(mean=mean, kind="uniform", spread=args.range_ratio)
        if args.log_normal is not None:
            return Lengths(mean=mean, kind="lognormal", spread=args.log_normal)
        return Lengths(mean=mean)

    closed = args.request_rate is None
    return Workload(
        concurrency=(args.concurrency or DEFAULT_CONCURRENCY) if closed else None,
        request_rate=args.request_rate,
        num_requests=args.num_requests,
        input=lengths(args.input_len),
        output=lengths(args.output_len),
        context_offset=args.context,
        stagger=args.stagger and closed,
    )


def window_of(args: argparse.Namespace) -> Window:
    """Iterations of a closed loop, unless a duration is asked for; seconds of Poisson arrivals."""
    if args.num_requests is not None and args.duration is None and args.iterations is None:
        return Window(warmup=args.warmup or 0.0)
    in_seconds = args.duration is not None or (args.request_rate is not None and args.iterations is None)
    length = (args.duration or 10.0) if in_seconds else (args.iterations or 20)
    warmup = length / 2 if args.warmup is None else args.warmup
    return Window(length=length, warmup=warmup, unit="seconds" if in_seconds else "iterations")


def configs_of(args: argparse.Namespace) -> tuple[dict[str, SimConfig], options.Hardware]:
    """One simulation per schedule, by its name, and the devices of all.

    Raises:
        ConfigError, CheckpointError: naming what cannot work.
    """
    hardware = options.find_hardware(args.device, include_host=args.host_us is None)
    sizes = hardware.sizes_for(options.find_sizes(args.model))
    placement, workload = placement_of(args), workload_of(args)
    needed = -(-(workload.concurrency or 0) // len(placement.attention_ranks))
    scheduler = SchedulerConfig(
        max_num_seqs=args.max_num_seqs or max(needed, SchedulerConfig().max_num_seqs),
        max_num_batched_tokens=args.max_num_batched_tokens,
    )
    base = SimConfig(
        sizes=sizes,
        device=hardware.device,
        routing=options.find_routing(args.routing, sizes, args.seed),
        workload=workload,
        window=window_of(args),
        fabric=options.find_fabric(
            args.device, args.fabric, args.devices_per_node, args.link_latency_us, args.link_gbs
        ),
        placement=placement,
        scheduler=scheduler,
        cache=CacheConfig(block_size=args.block_size, num_blocks=args.num_kv_blocks, enable_prefix_caching=False),
        host=HostModel(seconds=(args.host_us or 0.0) * 1e-6, mode=args.host_mode),
        slowdowns=tuple(args.slow),
        outages=tuple(args.stop),
        seed=args.seed,
    )
    names = [name.strip() for name in args.schedule.split(",")]
    if len(set(names)) < len(names):
        raise ConfigError(f"--schedule {args.schedule}: each schedule once")
    configs = {name: replace(base, scheduler=options.find_schedule(name, scheduler)) for name in names}
    if args.redundant_experts:
        loads = base.routing.popularity() if args.expert_load is None else read_loads(args.expert_load, sizes)
        mode: ShareMode = args.shares or ("even" if workload.concurrency is None else "planned")
        configs = {name: with_replicas(config, args.redundant_experts, loads, mode) for name, config in configs.items()}
    elif args.expert_load is not None or args.shares is not None:
        raise ConfigError("--expert-load and --shares are about --redundant-experts N: give that too")
    return configs, hardware


def run_simulate(args: argparse.Namespace) -> int:
    """`amoe simulate`. Returns the exit status. Raises `AmoeError`."""
    if args.plot:
        check_plot(args.plot)
    configs, hardware = configs_of(args)
    results: dict[str, Results] = {}
    for name, config in configs.items():
        simulator = Simulator(config, hardware.cost_model)
        with ProgressDisplay(Console(stderr=True), name) as progress:
            results[name] = simulator.run(progress.show)
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    print_results(console, describe(args, next(iter(configs.values()))), results)
    for name, result in results.items():
        print_workers(console, name, result)
    if args.json:
        write_json(args.json, flags_of(args), {name: asdict(result) for name, result in results.items()})
    if args.plot:
        points = {
            name: [Point(result.inter_token_latency.mean, result.tokens_per_s_per_device)]
            for name, result in results.items()
            if result.inter_token_latency.count
        }
        write_plot(args.plot, describe(args, next(iter(configs.values()))), points)
    return 0


def describe(args: argparse.Namespace, config: SimConfig) -> str:
    """One line about what is simulated."""
    placement, workload = config.placement, config.workload
    workers = f"{placement.colocated} colocated"
    if not placement.colocated:
        workers = f"{len(placement.attention_ranks)} attention and {len(placement.expert_ranks)} expert"
    load = f"{workload.concurrency} sequences"
    if workload.request_rate is not None:
        load = f"{workload.request_rate:g} requests/s"
    return f"{config.sizes.name} on {workers} workers ({config.device.name}), {args.routing}, {load}"

"""`amoe plan`: flags, and what to do with them."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from types import TracebackType

import numpy as np
from rich.console import Console

from amoe.errors import ConfigError
from amoe.profiles.devices import DEVICES, device_profile
from amoe.profiles.models import MODELS
from amoe.sim import options
from amoe.sim.flags import FILE_WIDTH, flags_of, known, real, report_file, whole
from amoe.sim.plan_options import Space
from amoe.sim.plan_plot import check_plot
from amoe.sim.plan_report import plot_plan, print_plan, recommendation, write_plan
from amoe.sim.plan_search import Goal, Job, Plan, search
from amoe.sim.planner import SCHEDULES, Evaluator, Outcome, Scenario
from amoe.sim.replicas import read_loads
from amoe.sim.report import ProgressDisplay

DEFAULT_DEVICES = 8
EXIT_NOT_MET = 1
FEW_JOBS = 2  # are not worth starting processes


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `plan`; its parser sets `func(args) -> int`, the exit status."""
    parser = subparsers.add_parser(
        "plan",
        help="find the placement, replicas and waves for a model, devices and a load",
        description="Search deployments of a model on modelled devices, and recommend one. "
        "Exit status 1: none keeps up with the rate and meets the SLO.",
    )
    parser.add_argument("model", metavar="MODEL", help=f"a checkpoint directory, or one of {', '.join(MODELS)}")
    _add_hardware(parser)
    _add_load(parser)
    _add_space(parser)
    parser.add_argument("--seed", type=whole(0), default=0, help="of routing and of the simulated counts (default 0)")
    parser.add_argument("--jobs", type=whole(1), metavar="N", help="processes (default: as many as cores)")
    parser.add_argument("--json", type=report_file, metavar="FILE", help="write all figures there")
    parser.add_argument(
        "--plot", type=report_file, metavar="FILE", help="throughput against ITL over load: *.svg, *.png or *.pdf"
    )
    parser.set_defaults(func=run_plan)


def _add_hardware(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("devices")
    group.add_argument("--device", default="h100", metavar="NAME", help=f"{', '.join(DEVICES)} (default h100)")
    group.add_argument(
        "--devices", type=whole(1), default=DEFAULT_DEVICES, metavar="N", help=f"(default {DEFAULT_DEVICES})"
    )
    group.add_argument("--fabric", metavar="NAME", help="links between devices (default: the device's)")
    nodes = group.add_mutually_exclusive_group()
    nodes.add_argument("--devices-per-node", type=whole(1), metavar="N", help="(default 8)")
    nodes.add_argument("--hosts", type=whole(1), metavar="N", help="instead: nodes that share the devices")
    group.add_argument("--link-latency-us", type=real(0), metavar="X", help="inside a node, not the fabric's")
    group.add_argument("--link-gbs", type=real(1e-6), metavar="X", help="gigabytes/s inside a node, likewise")
    group.add_argument("--slow", type=known(options.find_slowdown), action="append", default=[], metavar="RANK:FACTOR")


def _add_load(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("load", "without a rate and a number of sequences: a sweep")
    load = group.add_mutually_exclusive_group()
    load.add_argument("--rate", type=real(1e-9), metavar="R", help="requests per second")
    load.add_argument("--sequences", type=whole(1), metavar="C", help="in flight, a closed loop")
    group.add_argument(
        "--slo-itl",
        type=real(1e-6),
        metavar="MS",
        help="most milliseconds between tokens (p99); with --rate: the fewest devices that do it",
    )
    group.add_argument("--input-len", type=whole(1), default=512, metavar="N", help="prompt tokens (default 512)")
    group.add_argument("--output-len", type=whole(1), default=256, metavar="N", help="output tokens (default 256)")
    group.add_argument(
        "--prefill",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the same devices compute the prompts (default)",
    )
    group.add_argument(
        "--routing", default="sigma=1.0", metavar="R", help=f"{options.ROUTING_HELP} (default sigma=1.0)"
    )
    group.add_argument(
        "--expert-load", type=Path, metavar="FILE", help="loads that place replicas (default: those of --routing)"
    )


def _add_space(parser: argparse.ArgumentParser) -> None:
    base = Space()
    group = parser.add_argument_group("what to try")
    group.add_argument(
        "--redundant-experts",
        type=_numbers,
        default=base.redundant,
        metavar="N,N,...",
        help=f"replicas per device and layer (default {','.join(map(str, base.redundant))})",
    )
    group.add_argument("--waves", type=_waves, metavar="N", help="fixed, 1 to 8; default: auto, by the cost model")
    group.add_argument(
        "--placements", choices=("all", "colocated", "disaggregated"), default="all", help="(default all)"
    )
    lockstep = ", ".join(name for name in SCHEDULES if name != "waves")
    group.add_argument(
        "--compare",
        type=_names,
        default=base.lockstep,
        metavar="A,B,...",
        help=f"lockstep schedules, of {lockstep}; all; none (default {','.join(base.lockstep)})",
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(sorted({whole(0)(part) for part in text.split(",")}))


def _waves(text: str) -> int | None:
    if text == "auto":
        return None
    waves = whole(1)(text)
    if waves > 8:
        raise argparse.ArgumentTypeError(f"{text} is more than 8 waves")
    return waves


def _names(text: str) -> tuple[str, ...]:
    if text in ("all", "none"):
        return tuple(name for name in SCHEDULES if name != "waves") if text == "all" else ()
    return tuple(name.strip() for name in text.split(","))


# ---- what the flags make


def scenario_of(args: argparse.Namespace) -> Scenario:
    """Raises `ConfigError` or `CheckpointError`, naming what cannot work."""
    device = device_profile(args.device)
    sizes = options.find_sizes(args.model)
    per_node = -(-args.devices // args.hosts) if args.hosts else args.devices_per_node or 8
    fabric = options.find_fabric(args.device, args.fabric, per_node, args.link_latency_us, args.link_gbs)
    for slowdown in args.slow:
        if slowdown.rank >= args.devices or slowdown.at_s:
            raise ConfigError(f"--slow: a plan is for devices 0 to {args.devices - 1}, slow from the beginning")
    popularity = np.asarray(options.find_routing(args.routing, sizes, args.seed).popularity(), np.float64)
    believed = popularity if args.expert_load is None else read_loads(args.expert_load, sizes)
    return Scenario(
        sizes=sizes,
        device=device,
        fabric=fabric,
        popularity=popularity,
        believed=believed,
        input_len=args.input_len,
        output_len=args.output_len,
        prefill=args.prefill,
        slow={slowdown.rank: slowdown.factor for slowdown in args.slow},
        seed=args.seed,
    )


def goal_of(args: argparse.Namespace) -> Goal:
    """Raises `ConfigError`."""
    slo_itl = None if args.slo_itl is None else args.slo_itl * 1e-3
    return Goal(sequences=args.sequences, rate=args.rate, slo_itl=slo_itl)


def space_of(args: argparse.Namespace) -> Space:
    """Raises `ConfigError`."""
    return Space(
        redundant=args.redundant_experts,
        waves=args.waves,
        colocated=args.placements != "disaggregated",
        disaggregated=args.placements != "colocated",
        lockstep=args.compare,
        curves=args.plot is not None,
    )


def run_plan(args: argparse.Namespace) -> int:
    """`amoe plan`. Returns the exit status. Raises `AmoeError`."""
    if args.plot:
        check_plot(args.plot)
    goal, space = goal_of(args), space_of(args)
    errors = Console(stderr=True)
    scenario = scenario_of(args)
    with Workers(scenario, args.devices, args.jobs or len(os.sched_getaffinity(0)), errors) as workers:
        plan = search(scenario, args.devices, goal, space, workers.run)
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    print_plan(console, describe(args, goal), scenario, plan)
    for line in recommendation(scenario, plan, args.model):
        console.print(line, highlight=False, soft_wrap=True)
    _write_files(args, scenario, plan)
    return EXIT_NOT_MET if plan.best is None else 0


def _write_files(args: argparse.Namespace, scenario: Scenario, plan: Plan) -> None:
    if args.json:
        write_plan(args.json, flags_of(args), scenario, plan)
    if args.plot:
        plot_plan(args.plot, describe(args, plan.goal), plan)


def describe(args: argparse.Namespace, goal: Goal) -> str:
    """One line about what is planned."""
    load = "best load of each"
    if goal.rate is not None:
        load = f"{goal.rate:g} requests/s"
    elif goal.sequences is not None:
        load = f"{goal.sequences:,} sequences"
    slo = "" if goal.slo_itl is None else f", p99 ITL at most {goal.slo_itl * 1e3:g} ms"
    lengths = f"{args.input_len} + {args.output_len} tokens"
    return f"{Path(args.model).name} on {args.devices} × {args.device}, {args.routing}, {lengths}, {load}{slo}"


# ---- running


_evaluator: Evaluator | None = None  # of a process of the pool


def _initialise(scenario: Scenario, num_devices: int) -> None:
    global _evaluator
    _evaluator = Evaluator(scenario, num_devices)


def _run_here(job: Job) -> Outcome:
    assert _evaluator is not None
    return job.run(_evaluator)


class Workers:
    """Runs jobs in processes that are started when there is enough to do, with a bar per batch. A context manager."""

    def __init__(self, scenario: Scenario, num_devices: int, num_processes: int, console: Console) -> None:
        self._scenario, self._num_devices, self._num_processes = scenario, num_devices, num_processes
        self._console = console
        self._evaluator = Evaluator(scenario, num_devices)
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, title: str, jobs: Sequence[Job]) -> list[Outcome]:
        """Outcomes in the order of the jobs."""
        with ProgressDisplay(self._console, f"planning: {title}") as progress:
            if self._num_processes == 1 or (self._pool is None and len(jobs) <= FEW_JOBS):
                outcomes = []
                for job in jobs:
                    outcomes.append(job.run(self._evaluator))
                    progress.show(len(outcomes) / len(jobs))
                return outcomes
            futures = [self._started().submit(_run_here, job) for job in jobs]
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                progress.show(done / len(futures))
            return [future.result() for future in futures]

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self._num_processes,
                mp_context=multiprocessing.get_context("spawn"),  # the bar has a thread, which a fork would not survive
                initializer=_initialise,
                initargs=(self._scenario, self._num_devices),
            )
        return self._pool

"""Parts of the study that need every token by itself: the engine's own `WorkerCore` in modelled time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from amoe.bench.offline import Variant
from amoe.config import PlacementConfig, SchedulerConfig
from amoe.profiles.devices import DEVICES
from amoe.profiles.links import FABRICS
from amoe.profiles.models import MODELS
from amoe.profiles.routing import log_normal_routing
from amoe.sim.config import Outage, SimConfig, Slowdown, Window
from amoe.sim.replicas import with_replicas
from amoe.sim.routing import PooledRouting
from amoe.sim.simulator import Simulator
from amoe.sim.workload import Lengths, Workload
from benchmarks.study.task import Row, Task

# AMoE's workloads as mean tokens in the KV cache of a sequence that is half way through its answer.
WORKLOADS = {"short": 100, "medium": 175, "reasonable": 350}
COLOCATED = PlacementConfig(colocated=8)
DISAGGREGATED = PlacementConfig(attention_workers=4, expert_workers=4)
LONG = Lengths(mean=512, kind="uniform", spread=0.5)


def run_core(
    model: str,
    device: str,
    placement: PlacementConfig,
    variant: str,
    sequences: int,
    context: int,
    labels: dict[str, Any],
    iterations: int,
    redundant: int = 0,
) -> list[Row]:
    """Decode in a closed loop at σ = 1: no prompt but one token, on a context that is there already."""
    sizes = MODELS[model]
    routing = log_normal_routing(sizes, 1.0, seed=0)
    config = SimConfig(
        sizes=sizes,
        device=DEVICES[device],
        routing=routing,
        workload=Workload(
            concurrency=sequences, input=Lengths(mean=1), output=LONG, context_offset=context, stagger=True
        ),
        window=Window(length=iterations, warmup=6, unit="iterations"),
        fabric=FABRICS[device],
        placement=placement,
        scheduler=scheduler_of(variant, sequences, placement),
    )
    if redundant:
        config = with_replicas(config, redundant, routing.popularity(), "planned")
    result = Simulator(config).run()
    itl = result.inter_token_latency
    return [
        {
            **labels,
            "system": variant,
            "sequences": sequences,
            # Of a closed loop, from the time between tokens: tokens in a short window depend on where bursts fall.
            "throughput": sequences / itl.mean / placement.num_workers,
            "mean_itl_ms": itl.mean * 1e3,
            "p99_itl_ms": itl.p99 * 1e3,
            "tail": itl.p99 / itl.mean,
            "busy": sum(worker.busy_fraction for worker in result.workers) / len(result.workers),
            "steps": result.num_steps,
        }
    ]


def scheduler_of(variant: str, sequences: int, placement: PlacementConfig) -> SchedulerConfig:
    """`lockstep:2`, `waves:3`, `defrag` and so on, with room for all sequences."""
    per_home = -(-sequences // len(placement.attention_ranks))
    base = SchedulerConfig(max_num_seqs=per_home, max_num_batched_tokens=max(256, per_home))
    return Variant.parse(variant).apply(base)


def paper(iterations: int) -> list[Task]:
    """AMoE's setting: Mixtral with one KV head, A100, and its own comparison with the barrier taken out alone."""
    tasks = []
    for top_k, model in (("top-1", "mixtral-8x7b-mqa-top1"), ("top-2", "mixtral-8x7b-mqa")):
        for name, context in WORKLOADS.items():
            for where, placement in (("4 + 4", DISAGGREGATED), ("colocated", COLOCATED)):
                if where == "colocated" and name != "medium":
                    continue
                variants = ("lockstep", "defrag", "progress") if name == "medium" else ("lockstep", "defrag")
                for variant in variants:
                    labels = {"top_k": top_k, "workload": name, "placement": where, "devices": 8}
                    arguments = (model, "a100-80g", placement, variant, 4096, context, labels, iterations)
                    tasks.append(Task("paper", run_core, arguments))
    wide = {"8": (COLOCATED, 4096), "16": (PlacementConfig(colocated=16), 8192)}
    for devices, (placement, sequences) in wide.items():
        for variant in ("lockstep", "lockstep:2", "defrag", "progress", "waves:3"):
            labels = {"top_k": "16 experts, top-1", "workload": "medium", "placement": "colocated", "devices": devices}
            model = "mixtral-16x7b-mqa-top1"
            arguments = (model, "a100-80g", placement, variant, sequences, 175, labels, iterations)
            tasks.append(Task("paper", run_core, arguments))
    return tasks


def policies(iterations: int) -> list[Task]:
    """The paper's ablation of schedules, with ours, at two loads."""
    tasks = []
    for sequences in (512, 4096):
        for variant in (
            "lockstep",
            "lockstep:2",
            "flfs",
            "mtfs",
            "fcfs",
            "defrag",
            "progress",
            "waves:1",
            "waves:2",
            "waves:4",
        ):
            labels = {"model": "Mixtral top-1", "sigma": 1.0}
            arguments = (
                "mixtral-8x7b-mqa-top1", "h100", COLOCATED, variant, sequences, 512, labels, iterations
            )  # fmt: skip
            tasks.append(Task("policies", run_core, arguments))
    return tasks


def fault_timeline(what: str, variant: str, seconds: float) -> list[Row]:
    """Throughput over time while something happens to one expert device of 4 + 4."""
    sizes = MODELS["mixtral-8x7b-mqa-top1"]
    slowdowns: tuple[Slowdown, ...] = ()
    outages: tuple[Outage, ...] = ()
    third = seconds / 3
    if what == "slower by half":
        slowdowns = (Slowdown(rank=5, factor=1.5, at_s=third),)
    elif what == "stands still":
        outages = (Outage(rank=5, start_s=third, end_s=2 * third),)
    else:
        outages = (Outage(rank=5, start_s=third),)
    sequences = 4096
    config = SimConfig(
        sizes=sizes,
        device=DEVICES["h100"],
        routing=log_normal_routing(sizes, 0.5, seed=0),
        workload=Workload(concurrency=sequences, input=Lengths(mean=1), output=LONG, context_offset=512, stagger=True),
        window=Window(length=seconds),
        placement=DISAGGREGATED,
        scheduler=replace(scheduler_of(variant, sequences, DISAGGREGATED), max_hold_s=0.05),
        slowdowns=slowdowns,
        outages=outages,
    )
    result = Simulator(config).run()
    rows: list[Row] = [
        {"what": what, "system": variant, "second": item.start_s, "of": seconds, "throughput": item.tokens_per_s / 8}
        for item in result.timeline
    ]
    width = result.timeline[1].start_s - result.timeline[0].start_s
    over = result.timeline[-1].start_s + width
    if over < seconds - width:  # nothing can happen any more: the simulation ended before its time
        rows += [{**rows[-1], "second": second, "throughput": 0.0} for second in (over, seconds)]
    return rows


def faults(seconds: float) -> list[Task]:
    """Each fault, for lockstep and for waves."""
    return [
        Task("faults", fault_timeline, (what, variant, seconds))
        for what in ("slower by half", "stands still", "dies")
        for variant in ("lockstep", "waves:2")
    ]


def serve(variant: str, rate: float, seconds: float) -> list[Row]:
    """Poisson arrivals with their prompts: newcomers join waves in the middle of traffic, and W is probed online."""
    sizes = MODELS["olmoe-1b-7b"]
    placement = PlacementConfig(colocated=4)
    config = SimConfig(
        sizes=sizes,
        device=DEVICES["h100"],
        routing=PooledRouting(log_normal_routing(sizes, 1.0, seed=0), seed=0),
        workload=Workload(
            request_rate=rate,
            input=Lengths(mean=256, kind="lognormal", spread=0.5),
            output=Lengths(mean=64, kind="lognormal", spread=0.5),
        ),
        window=Window(length=seconds, warmup=seconds / 3),
        placement=placement,
        scheduler=scheduler_of(variant, 4096, placement),
    )
    result = Simulator(config).run()
    itl, ttft = result.inter_token_latency, result.time_to_first_token
    return [
        {
            "rate": rate,
            "system": variant,
            "throughput": result.tokens_per_s_per_device,
            "mean_itl_ms": itl.mean * 1e3,
            "p99_itl_ms": itl.p99 * 1e3,
            "tail": itl.p99 / itl.mean,
            "ttft_ms": ttft.mean * 1e3,
            "p99_ttft_ms": ttft.p99 * 1e3,
        }
    ]


def serving(seconds: float) -> list[Task]:
    """Lightly and well loaded."""
    variants = ("lockstep", "progress", "waves:1", "waves")
    return [Task("serving", serve, (variant, rate, seconds)) for rate in (200, 800) for variant in variants]

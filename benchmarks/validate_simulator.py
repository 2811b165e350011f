"""Does the simulator say what the real engine does? Two comparisons, point by point.

    python -m benchmarks.validate_simulator [--part emulated|cpu] [--only TEXT] [--rounds N] [--out PREFIX]

*emulated*: the real engine (processes, queues, schedules, shared memory) on emulated devices, against the simulator on
the same device profile, slowed by the same stated factor. The simulator is told the host time per step that the run has
measured; it is small against a slowed step, and shown.

*cpu*: the real engine with real kernels on this machine, against the simulator with tables that
`benchmarks.measure_profile` takes right before and right after: kernels and host, one thread per worker, and the
experts that recorded tokens took. *Raw* is the mean of both simulations, and *drift* their ratio, since a shared
machine's speed changes within seconds. What is *simulated* is the simulator's part alone, batches, queues and waiting:
the table is multiplied by one number per worker, so that its mean step takes as long as it did in the run.

Both sides run the same closed loop and measure the same window. Rounds repeat a point; the one with the least drift, or
else the fewest foreign processes, counts. Writes PREFIX.json and PREFIX.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from amoe.bench.offline import Variant
from amoe.builtin import builtin_model_path
from amoe.config import CacheConfig, EngineConfig, PlacementConfig, SchedulerConfig
from amoe.engine.build import build_worker
from amoe.engine.emulated_device import emulated_device, served_shape
from amoe.engine.messages import AddRequest
from amoe.models.config import load_model_config
from amoe.profiles.costs import BlockCosts
from amoe.profiles.devices import DeviceProfile, device_profile
from amoe.profiles.links import Fabric, LinkProfile
from amoe.profiles.measured import MeasuredCosts, ScaledCosts
from amoe.profiles.models import ModelSizes
from amoe.profiles.routing import RecordedRouting, RoutingModel
from amoe.sim.config import HostModel, SimConfig, Slowdown, Window
from amoe.sim.simulator import Simulator
from amoe.sim.timing import ROOFLINE, CostModel
from amoe.sim.workload import Lengths, Workload
from amoe.transport.shm_fabric import ShmFabric
from amoe.types import SamplingParams
from benchmarks import make_checkpoint, measure_profile
from benchmarks.closed_loop import Steady, measure_steady, raise_priority, slope
from benchmarks.step_time import NoControl, parse_placement
from benchmarks.validation_report import Comparison, Point, cpu_points, emulated_points, summary, table

# A few layers of OLMoE, and the built-in vocabulary: steps long enough for this host, iterations short enough for us.
EMULATED_SHAPE = make_checkpoint.Shape(
    hidden_size=2048,
    num_layers=4,
    num_heads=16,
    num_experts=64,
    top_k=8,
    intermediate_size=1024,
    vocab_size=4096,
    max_position=4096,
)
WAITING_PER_HOME = 2  # so that whoever ends is replaced at once: the round trip to the server is not what is compared
# Shared memory between processes of one host: the wake-up of a sleeping process, and copies.
THIS_HOST = Fabric(devices_per_node=1024, intra=LinkProfile(30e-6, 5e9))
CPU_DEVICE = DeviceProfile(name="cpu", peak_flops=4e11, memory_bandwidth=4e10, memory_bytes=1e15)  # memory: no limit


@dataclass(frozen=True, slots=True)
class Effort:
    """How often the engine runs, and with which priority."""

    rounds: int
    nice: int


# ---- the two sides


def workload_of(point: Point) -> Workload:
    """Short prompts and short answers, so that both are in every window."""
    return Workload(
        concurrency=point.batch,
        input=Lengths(mean=16),
        output=Lengths(mean=48, kind="uniform", spread=0.5),
        stagger=True,
    )


def engine_config(point: Point, model: str, device: str) -> EngineConfig:
    """The engine's side."""
    placement = parse_placement(point.placement)
    per_home = -(-point.batch // len(placement.attention_ranks))
    scheduler = SchedulerConfig(max_num_seqs=per_home, max_num_batched_tokens=512)
    return EngineConfig(
        model=model,
        device=device,
        placement=placement,
        scheduler=Variant.parse(point.schedule).apply(scheduler),
        threads_per_worker=1,
        max_model_len=128,
        cache=CacheConfig(num_blocks=8 * per_home, enable_prefix_caching=False),
    )


def run_engine(point: Point, config: EngineConfig, window: Window, effort: Effort) -> Steady:
    """The least disturbed of some runs."""
    vocab_size, workload = load_model_config(config.model).vocab_size, workload_of(point)
    runs = [
        asyncio.run(measure_steady(config, workload, window, vocab_size, effort.nice)) for _ in range(effort.rounds)
    ]
    return min(runs, key=lambda run: run.foreign_cpu)


@dataclass(frozen=True, slots=True)
class Simulated:
    """Tokens per second, seconds between two tokens of a sequence, and mean seconds of a step of each worker."""

    tokens_per_s: float
    itl_s: float
    step_s: tuple[float, ...]


def simulate(config: SimConfig, cost_model: CostModel = ROOFLINE) -> Simulated:
    """The simulator's side."""
    simulator = Simulator(config, cost_model)
    results = simulator.run()
    meter = simulator._tokens
    first = int(np.searchsorted(meter._times, meter._times[-1] - results.window_s, side="right"))
    step_s = tuple(
        worker.busy_fraction * results.window_s / max(1, sum(block.steps for block in worker.blocks.values()))
        for worker in results.workers
    )
    rate = slope(meter._times[first:], meter._counts[first:])
    return Simulated(rate, results.inter_token_latency.mean, step_s)


def simulation_of(point: Point, config: EngineConfig, window: Window, **fields: Any) -> SimConfig:
    """The simulator's side."""
    return SimConfig(
        workload=workload_of(point),
        window=window,
        fabric=THIS_HOST,
        placement=config.placement,
        scheduler=config.scheduler,
        cache=config.cache,
        max_model_len=config.max_model_len,
        **fields,
    )


def emulated_checkpoint(directory: str) -> str:
    """A checkpoint without weights."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(builtin_model_path() / name, directory)
    Path(directory, "config.json").write_text(json.dumps(EMULATED_SHAPE.as_config()))
    return directory


def compare_emulated(point: Point, model: str, effort: Effort) -> Comparison:
    """Emulated devices against simulated ones."""
    window = Window(length=14, warmup=3, unit="iterations")
    config = engine_config(point, model, f"emulated:h100,slow={point.slowdown},sigma={point.sigma}")
    engine = run_engine(point, config, window, effort)
    sizes, emulated = served_shape(config), emulated_device(config)
    assert emulated is not None and isinstance(sizes, ModelSizes)
    simulation = simulation_of(
        point,
        config,
        window,
        sizes=sizes,
        device=device_profile("h100").slowed(point.slowdown),
        routing=emulated.routing(sizes),
        host=HostModel(seconds=max(0.0, engine.host_s)),
    )
    simulated = simulate(simulation)
    return Comparison(point=point, engine=engine, tokens_per_s=simulated.tokens_per_s, itl_s=simulated.itl_s)


# ---- real kernels


def record_routing(config: EngineConfig, num_sequences: int, num_new: int) -> RecordedRouting:
    """Experts of the tokens of random prompts and their answers, by running the checkpoint in this process."""
    checkpoint = load_model_config(config.model)
    fabric, control = ShmFabric.create(1, 1 << 16), NoControl()
    transport = fabric.endpoint(0)
    worker = build_worker(config, 0, transport, control)
    assert worker._attention is not None and worker.core.attention is not None
    executor, seen = worker._attention._blocks, [[] for _ in range(checkpoint.num_layers)]  # type: ignore[var-annotated]
    attention = executor.attention

    def recording(step: Any) -> Any:
        out = attention(step)
        seen[step.block.layer].append(None if out is None else out.topk_ids)
        return out

    executor.attention = recording  # type: ignore[method-assign]
    rng = np.random.default_rng(0)
    params = SamplingParams(max_tokens=num_new, temperature=0.0, ignore_eos=True)
    prompts = rng.integers(0, checkpoint.vocab_size, size=(num_sequences, 16)).tolist()
    control.inbox = [AddRequest(index, prompt, params) for index, prompt in enumerate(prompts)]
    with torch.inference_mode():
        worker.turn()
        while worker.core.queues.depth.any() or worker.core.attention.batcher.running:
            worker.turn()
    transport.close()
    fabric.close()
    layers = [np.concatenate(ids) for ids in seen]
    count = min(len(ids) for ids in layers)
    return RecordedRouting(np.stack([ids[:count] for ids in layers], axis=1), checkpoint.num_experts)


def calibrate(config: EngineConfig, batch: int) -> MeasuredCosts:
    """Kernels of the checkpoint, and the host's time in this very placement and schedule."""
    alone = measure_profile.profile_config(config.model, config.device, 1)
    per_home = config.scheduler.max_num_seqs
    document = measure_profile.measure(alone, PlacementConfig(), 16, "", (1, batch // 2, 3 * batch), ())
    for kind, samples in measure_profile.measure_host(config, per_home).items():
        document[kind.name.lower()]["host"] = measure_profile.host_points(samples)
    return MeasuredCosts(document).with_host()


def compare_cpu_once(point: Point, model: str, routing: RoutingModel, nice: int) -> Comparison:
    """Real kernels against the measured profile."""
    window = Window(length=150 if point.model == "builtin" else 60, warmup=20, unit="iterations")
    config = engine_config(point, model, "cpu")
    before = calibrate(config, point.batch)
    engine = run_engine(point, config, window, Effort(1, nice))
    after = calibrate(config, point.batch)
    sizes = before.sizes
    simulation = simulation_of(point, config, window, sizes=sizes, device=CPU_DEVICE, routing=routing)
    raw = [simulate(simulation, measured_costs(costs)) for costs in (before, after)]
    factors = np.asarray(engine.worker_step_s) / np.asarray(raw[0].step_s)
    slowdowns = tuple(Slowdown(rank=rank, factor=float(factor)) for rank, factor in enumerate(factors))
    scaled = simulate(replace(simulation, slowdowns=slowdowns), measured_costs(before))
    return Comparison(
        point=point,
        engine=engine,
        tokens_per_s=scaled.tokens_per_s,
        itl_s=scaled.itl_s,
        raw_itl_s=(raw[0].itl_s + raw[1].itl_s) / 2,
        drift=max(run.itl_s for run in raw) / min(run.itl_s for run in raw) - 1,
    )


def measured_costs(costs: MeasuredCosts) -> CostModel:
    """These for every device, but for its slowdown."""

    def make(_sizes: ModelSizes, device: DeviceProfile) -> BlockCosts:
        return ScaledCosts(costs, device.slowdown)

    return make


def compare_cpu(point: Point, model: str, routing: RoutingModel, effort: Effort) -> Comparison:
    """The round with the least drift."""
    rounds = [compare_cpu_once(point, model, routing, effort.nice) for _ in range(effort.rounds)]
    return min(rounds, key=lambda item: item.drift)


# ---- report


def run_part(
    title: str, points: list[Point], run: Callable[[Point], Comparison], goal: float
) -> tuple[list[Comparison], str]:
    """All points of a part, shown as they come."""
    comparisons = []
    for point in points:
        comparisons.append(run(point))
        print(list(table(comparisons[-1:]))[-1], flush=True)
    line = summary(comparisons, goal)
    print(line, flush=True)
    return comparisons, "\n".join([f"## {title}", "", *table(comparisons), "", line, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("emulated", "cpu"))
    parser.add_argument("--only", default="", help="points whose description contains this")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--nice", type=int, default=0, help="of all that is measured here: negative on a shared machine"
    )
    parser.add_argument("--out", type=Path, help="prefix of the report's files")
    args = parser.parse_args()
    raise_priority([os.getpid()], args.nice)
    texts, done = [], []
    with tempfile.TemporaryDirectory() as directory:
        for part in (args.part,) if args.part else ("emulated", "cpu"):
            comparisons, text = _emulated(args, directory) if part == "emulated" else _cpu(args, directory)
            texts.append(text)
            done += comparisons
    if args.out:
        args.out.with_suffix(".md").write_text("\n".join(texts))
        document = {"machine": measure_profile.describe_machine(), "comparisons": [asdict(item) for item in done]}
        args.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")


def _emulated(args: argparse.Namespace, directory: str) -> tuple[list[Comparison], str]:
    model = emulated_checkpoint(directory)
    points = [point for point in emulated_points() if args.only in str(point)]
    title = "Emulated h100, every time multiplied by `slow`"
    return run_part(title, points, lambda point: compare_emulated(point, model, Effort(args.rounds, args.nice)), 0.10)


def _cpu(args: argparse.Namespace, directory: str) -> tuple[list[Comparison], str]:
    points = [point for point in cpu_points() if args.only in str(point)]
    models = {name: _checkpoint(name, directory) for name in {point.model for point in points}}
    routing = {
        name: record_routing(measure_profile.profile_config(path, "cpu", 1), 32, 32) for name, path in models.items()
    }
    effort = Effort(args.rounds, args.nice)

    def run(point: Point) -> Comparison:
        return compare_cpu(point, models[point.model], routing[point.model], effort)

    return run_part("Real kernels on this CPU, one thread per worker", points, run, 0.15)


def _checkpoint(name: str, directory: str) -> str:
    if name == "builtin":
        return str(builtin_model_path())
    path = Path(directory, name)
    make_checkpoint.make_checkpoint(path, make_checkpoint.SIZES[name], router_skew=1.0)
    return str(path)


if __name__ == "__main__":
    main()

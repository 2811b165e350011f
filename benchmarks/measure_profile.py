"""Measure what the blocks of a checkpoint cost on this machine, for the simulator and for emulated devices.

    python -m benchmarks.measure_profile FILE.json [--model DIR] [--device cpu] [--threads 1] [--placement 1]

Kernel time is that inside the executors of the real engine, which run steps made for the purpose: every number of
tokens with every context, and experts with equal shares, layer after layer as in a real pass, so that weights come
from where they come from in service. Host time is the rest of a turn of the worker's loop, in a placement whose workers
share this process and exchange tokens through shared memory. Medians throughout.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from amoe.builtin import builtin_model_path
from amoe.cluster.local import ring_bytes_for
from amoe.config import CacheConfig, EngineConfig, PlacementConfig, SchedulerConfig
from amoe.core.steps import AttentionStep, ExpertsStep, HeadStep, Step
from amoe.engine.build import build_worker
from amoe.engine.devices import threads_per_worker
from amoe.engine.emulated_device import checkpoint_sizes
from amoe.engine.messages import AddRequest
from amoe.engine.sampler import SamplingTable
from amoe.engine.worker import Worker
from amoe.models.config import ModelConfig, load_model_config
from amoe.profiles.measured import FORMAT, load_measured
from amoe.transport.shm import ShmFabric
from amoe.types import BlockId, BlockKind, SamplingParams
from benchmarks.step_time import NoControl, parse_placement

T = TypeVar("T")
Point = dict[str, float]

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXTS = (16, 128, 512)
PAIRS_PER_EXPERT = (1, 2, 4, 8, 16, 32, 64)
HOST_TOKENS = (1, 4, 16, 64)
BLOCK_SIZE = 16
_NEW_TOKENS = 24


def _median_s(runs: Iterable[Callable[[], Any]], synchronize: Callable[[], None]) -> float:
    times = []
    for run in runs:
        start = time.perf_counter()
        run()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[len(times) // 4 :])  # the first ones warm up


class Kernels:
    """The executors of one worker that holds everything, run with steps of our making."""

    def __init__(self, config: EngineConfig, checkpoint: ModelConfig, repeats: int) -> None:
        self._fabric = ShmFabric.create(1, 1 << 16)
        self._transport = self._fabric.endpoint(0)
        worker = build_worker(config, 0, self._transport, NoControl())
        assert worker._home is not None and worker._experts is not None and worker.core.attention is not None
        self._attention, self._experts = worker._home._executor, worker._experts
        self._batcher = worker.core.attention.batcher
        self._checkpoint = checkpoint
        self._sampling = SamplingTable(config.scheduler.max_num_seqs, checkpoint.vocab_size)
        self._layers = [layer for layer, sparse in enumerate(checkpoint.sparse_layers) if sparse]
        self._repeats = repeats
        self._rng = np.random.default_rng(0)
        self._synchronize = torch.cuda.synchronize if config.device.startswith("cuda") else (lambda: None)
        table = self._batcher.table
        table.tokens[:] = self._rng.integers(3, checkpoint.vocab_size, size=table.tokens.shape)
        used = -(-(max(CONTEXTS) + 1) // BLOCK_SIZE)
        table.block_table[:, :used] = np.arange(len(table.block_table) * used).reshape(-1, used)
        self._batcher.join.dispatched[:] = True  # there is one owner, and it answers everything

    def close(self) -> None:
        self._transport.close()
        self._fabric.close()

    def _passes(self) -> list[int]:
        """Layers in the order of real passes, at least `repeats` in all."""
        return self._layers * -(-self._repeats // len(self._layers))

    def attention(self, num_tokens: int, context: int) -> float:
        """Seconds of a step of decode tokens."""
        slots = np.arange(num_tokens, dtype=np.int32)
        positions = np.full(num_tokens, context - 1, np.int32)

        def run(layer: int) -> None:
            step = AttentionStep(BlockId(BlockKind.ATTENTION, layer), slots, slots, positions, num_tokens)
            self._attention.attention(step)

        return _median_s([lambda layer=layer: run(layer) for layer in self._passes()], self._synchronize)  # type: ignore[misc]

    def experts(self, active: int, pairs: int) -> float:
        """Seconds of a step in which `active` experts have `pairs` pairs each."""
        width = min(self._checkpoint.top_k, active)
        num_tokens = active * pairs // width
        shuffled = self._rng.permutation(self._checkpoint.num_experts)[:active]
        ids = np.full((num_tokens, self._checkpoint.top_k), -1, np.int16)
        ids[:, :width] = shuffled[np.arange(num_tokens * width) % active].reshape(-1, width)
        weights = np.full(ids.shape, 1 / width, np.float32)
        slots = np.arange(num_tokens, dtype=np.int32)

        def run(layer: int) -> None:
            self._experts.experts(ExpertsStep(BlockId(BlockKind.EXPERTS, layer), slots, ids, weights, []))

        return _median_s([lambda layer=layer: run(layer) for layer in self._passes()], self._synchronize)  # type: ignore[misc]

    def head(self, num_tokens: int) -> float:
        """Seconds of a step of greedy sampling."""
        slots = np.arange(num_tokens, dtype=np.int32)
        step = HeadStep(BlockId(BlockKind.HEAD, self._checkpoint.num_layers), slots, slots)
        generated = np.zeros(num_tokens, np.int64)
        runs = [lambda: self._attention.sample(step, self._sampling, generated)] * self._repeats
        return _median_s(runs, self._synchronize)


def fit_experts(kernels: Kernels, num_experts: int, top_k: int) -> tuple[float, list[Point]]:
    """Fixed seconds of a step, and each expert's own: slope and intercept over the number of active experts."""
    actives = sorted({1, top_k, num_experts // 2, num_experts})
    fixed, per_expert = [], []
    for pairs in PAIRS_PER_EXPERT:
        slope, intercept = np.polyfit(actives, [kernels.experts(active, pairs) for active in actives], 1)
        fixed.append(max(0.0, float(intercept)))
        per_expert.append({"tokens": pairs, "seconds": max(0.0, float(slope))})
    return statistics.median(fixed), per_expert


# ---- the host


class HostWatch:
    """Seconds inside the executors of some workers since the last reset."""

    def __init__(self, workers: Iterable[Worker], synchronize: Callable[[], None]) -> None:
        self.seconds = 0.0
        self._synchronize = synchronize
        for worker in workers:
            if worker._home is not None:
                self._watch(worker._home._executor, "attention", "sample")
            if worker._experts is not None:
                self._watch(worker._experts, "experts")

    def _watch(self, executor: object, *names: str) -> None:
        for name in names:
            setattr(executor, name, self._timed(getattr(executor, name)))

    def _timed(self, run: Callable[..., T]) -> Callable[..., T]:
        def timed(*args: Any) -> T:
            start = time.perf_counter()
            out = run(*args)
            self._synchronize()
            self.seconds += time.perf_counter() - start
            return out

        return timed


def measure_host(config: EngineConfig, num_tokens: int) -> dict[BlockKind, list[tuple[int, float]]]:
    """(tokens or pairs, host seconds) of every step while `num_tokens` sequences per home decode."""
    ranks = range(config.placement.num_workers)
    fabric = ShmFabric.create(len(ranks), ring_bytes_for(config, load_model_config(config.model)))
    transports, controls = [fabric.endpoint(rank) for rank in ranks], [NoControl() for _ in ranks]
    workers = [build_worker(config, rank, transports[rank], controls[rank]) for rank in ranks]
    watch = HostWatch(workers, torch.cuda.synchronize if config.device.startswith("cuda") else (lambda: None))
    params = SamplingParams(max_tokens=_NEW_TOKENS, temperature=0.0, ignore_eos=True)
    for rank in config.placement.attention_ranks:
        controls[rank].inbox = [AddRequest(i, [5 + i % 50, 7, 9 + i % 70, 11], params) for i in range(num_tokens)]
    samples: dict[BlockKind, list[tuple[int, float]]] = defaultdict(list)
    idle = 0
    while idle < 100:
        for worker in workers:
            seen: list[Step] = []
            worker.stats.observe = lambda step, _, seen=seen: seen.append(step)  # type: ignore[method-assign, misc]
            watch.seconds, start = 0.0, time.perf_counter()
            worker.turn()
            elapsed = time.perf_counter() - start
            idle = 0 if seen else idle + 1
            for step in seen:
                count = int((step.expert_ids >= 0).sum()) if isinstance(step, ExpertsStep) else step.num_tokens
                samples[step.block.kind].append((count, elapsed - watch.seconds))
    for transport in transports:
        transport.close()
    fabric.close()
    return samples


def host_points(samples: Iterable[tuple[int, float]]) -> list[Point]:
    """Medians over powers of two of tokens."""
    groups: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for count, seconds in samples:
        if count:
            groups[round(np.log2(count))].append((count, seconds))
    points = [
        {"tokens": statistics.fmean(n for n, _ in group), "seconds": statistics.median(s for _, s in group)}
        for group in groups.values()
        if len(group) >= 8
    ]
    return sorted(points, key=lambda point: point["tokens"])


# ---- all of it


def describe_machine() -> str:
    """Processor and torch, without a name or a date."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return f"{len(os.sched_getaffinity(0))} x {names[0] if names else 'unknown CPU'}, torch {torch.__version__}"


def measure(config: EngineConfig, placement: PlacementConfig, repeats: int, name: str) -> dict[str, Any]:
    """The object of a measured profile. `config` is of one worker; `placement` is that of the host's time."""
    checkpoint = load_model_config(config.model)
    with torch.inference_mode():
        kernels = Kernels(config, checkpoint, repeats)
        attention = [
            {"tokens": n, "context": context, "seconds": kernels.attention(n, context)}
            for n in TOKENS
            for context in CONTEXTS
        ]
        fixed, per_expert = fit_experts(kernels, checkpoint.num_experts, checkpoint.top_k)
        head = [{"tokens": n, "seconds": kernels.head(n)} for n in TOKENS]
        kernels.close()
    hosts: dict[BlockKind, list[tuple[int, float]]] = defaultdict(list)
    for num_tokens in HOST_TOKENS:
        for kind, samples in measure_host(replace_placement(config, placement), num_tokens).items():
            hosts[kind] += samples
    return {
        "format": FORMAT,
        "name": name,
        "machine": describe_machine(),
        "dtype": config.dtype if config.dtype != "auto" else checkpoint.torch_dtype,
        "threads": threads_per_worker(config),
        "model": asdict(checkpoint_sizes(checkpoint)),
        "attention": {"points": attention, "host": host_points(hosts[BlockKind.ATTENTION])},
        "experts": {"fixed": fixed, "per_expert": per_expert, "host": host_points(hosts[BlockKind.EXPERTS])},
        "head": {"points": head, "host": host_points(hosts[BlockKind.HEAD])},
    }


def replace_placement(config: EngineConfig, placement: PlacementConfig) -> EngineConfig:
    """`config` with other workers."""
    return EngineConfig(
        model=config.model,
        dtype=config.dtype,
        device=config.device,
        threads_per_worker=config.threads_per_worker,
        placement=placement,
        scheduler=config.scheduler,
        cache=config.cache,
    )


def profile_config(model: str, device: str, threads: int) -> EngineConfig:
    """Of the worker that is measured."""
    blocks_of_sequence = -(-(max(CONTEXTS) + 1) // BLOCK_SIZE)
    most = max(TOKENS)
    # The slab has a place for each token of a step of experts, though only so many sequences run.
    return EngineConfig(
        model=model,
        device=device,
        threads_per_worker=threads,
        scheduler=SchedulerConfig(max_num_seqs=most, max_num_batched_tokens=4096),
        cache=CacheConfig(num_blocks=most * blocks_of_sequence, block_size=BLOCK_SIZE, enable_prefix_caching=False),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", default=str(builtin_model_path()))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--placement", default="1", type=parse_placement, help="of the host's time: 1, 2, 1A+1E, ...")
    parser.add_argument("--repeats", type=int, default=48, help="runs behind each median")
    parser.add_argument("--name", help="default: model and device")
    args = parser.parse_args()
    name = args.name or f"{Path(args.model).resolve().name} on {args.device}"
    config = profile_config(args.model, args.device, args.threads)
    document = measure(config, args.placement, args.repeats, name)
    args.file.write_text(json.dumps(document, indent=1) + "\n")
    costs = load_measured(args.file)  # says so if it is not fit for use
    for n in (1, 16, 64):
        num_experts = costs.sizes.num_experts
        counts = np.bincount(np.arange(n * costs.sizes.top_k) % num_experts, minlength=num_experts)
        kernels = costs.attention(0, n, n * 64), float(costs.experts(0, counts)), costs.head(n)
        full = costs.with_host()
        both = full.attention(0, n, n * 64), float(full.experts(0, counts)), full.head(n)
        print(
            f"{n} tokens: "
            + ", ".join(
                f"{kind} {k * 1e6:.0f} + {(b - k) * 1e6:.0f} µs"
                for kind, k, b in zip(("attention", "experts", "head"), kernels, both, strict=True)
            )
        )


if __name__ == "__main__":
    main()

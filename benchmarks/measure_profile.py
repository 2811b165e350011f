"""Measure what the blocks of a checkpoint cost on this machine, for the simulator and for emulated devices.

    python -m benchmarks.measure_profile FILE.json [--model DIR] [--device cpu] [--threads 1] [--placement 1]

Kernel time is that inside the executors of the real engine, which run steps made for the purpose: every number of
tokens with every context, and experts with equal shares. They run in passes through the model, attention and experts
in turn and then the head, so that weights come from where they come from in service: repeated by itself, a small block
finds its weights in the cache and takes half of its time. Host time is the rest of a turn of the worker's loop, in a
placement whose workers share this process and exchange tokens through shared memory. Means without the upper and lower
twentieth: throughput is made of means.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from amoe.builtin import builtin_model_path
from amoe.cluster.local import ring_bytes_for
from amoe.config import CacheConfig, EngineConfig, PlacementConfig, SchedulerConfig
from amoe.core.steps import AttentionStep, BlockStep, ExpertsStep, HeadStep
from amoe.engine.build import build_worker
from amoe.engine.cpus import threads_per_worker
from amoe.engine.messages import AddRequest
from amoe.engine.sampling_table import SamplingTable
from amoe.engine.worker import Worker
from amoe.models.config import ModelConfig, load_model_config
from amoe.profiles.checkpoints import checkpoint_sizes
from amoe.profiles.measured import FORMAT, load_measured
from amoe.transport.shm_fabric import ShmFabric
from amoe.types import BlockId, BlockKind, Int16Array, SamplingParams
from benchmarks.step_time import NoControl, parse_placement

T = TypeVar("T")
Point = dict[str, float]

TOKENS = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (16, 48, 128)
PAIRS_PER_EXPERT = (1, 2, 4, 8, 16, 32)
HOST_TOKENS = (1, 4, 16, 64)
BLOCK_SIZE = 16
BLOCKS_OF_SEQUENCE = -(-2 * max(CONTEXTS) // BLOCK_SIZE)
_NEW_TOKENS = 24


def trimmed_mean(values: Iterable[float]) -> float:
    """Without the upper and the lower twentieth."""
    ordered = sorted(values)
    cut = len(ordered) // 20
    return statistics.fmean(ordered[cut : len(ordered) - cut])


class PassTimes(NamedTuple):
    """Seconds of the blocks in passes through the model."""

    attention: float
    experts: float
    head: float


class Kernels:
    """The executors of one worker that holds everything, run with steps of our making."""

    def __init__(self, config: EngineConfig, checkpoint: ModelConfig, repeats: int) -> None:
        self._fabric = ShmFabric.create(1, 1 << 16)
        self._transport = self._fabric.endpoint(0)
        worker = build_worker(config, 0, self._transport, NoControl())
        assert worker._attention is not None and worker._experts is not None and worker.core.attention is not None
        self._attention, self._experts = worker._attention._blocks, worker._experts
        self._batcher = worker.core.attention.batcher
        self._checkpoint = checkpoint
        self._sampling = SamplingTable(config.scheduler.max_num_seqs, checkpoint.vocab_size)
        self._layers = [layer for layer, sparse in enumerate(checkpoint.sparse_layers) if sparse]
        self._repeats = repeats
        self._rng = np.random.default_rng(0)
        self._synchronize = torch.cuda.synchronize if config.device.startswith("cuda") else (lambda: None)
        table = self._batcher.table
        table.tokens[:] = self._rng.integers(3, checkpoint.vocab_size, size=table.tokens.shape)
        used = BLOCKS_OF_SEQUENCE
        table.block_table[:, :used] = np.arange(len(table.block_table) * used).reshape(-1, used)
        self._batcher.join.dispatched[:] = True  # there is one owner, and it answers everything

    def close(self) -> None:
        self._transport.close()
        self._fabric.close()

    def passes(self, num_tokens: int, context: int, active: int, pairs: int) -> PassTimes:
        """Passes of `num_tokens` decode tokens with `context` tokens of context on average, in which the experts of a
        layer compute something else: `active` experts have `pairs` pairs each.

        Contexts are spread, from a tenth to nearly twice the average, since sequences are at different points of their
        lives and a kernel may cost what the longest costs.
        """
        slots = np.arange(num_tokens, dtype=np.int32)
        spread = np.linspace(0.1, 1.9, num_tokens) if num_tokens > 1 else np.ones(1)
        positions = self._rng.permutation(np.ceil(context * spread).astype(np.int32) - 1)
        ids = self._expert_ids(active, pairs)
        rows, weights = np.arange(len(ids), dtype=np.int32), np.full(ids.shape, 0.5, np.float32)
        head = HeadStep(BlockId(BlockKind.HEAD, self._checkpoint.num_layers), slots, slots)
        generated = np.zeros(num_tokens, np.int64)
        times: tuple[list[float], ...] = ([], [], [])
        for _ in range(1 + -(-self._repeats // len(self._layers))):
            for layer in self._layers:
                step = AttentionStep(BlockId(BlockKind.ATTENTION, layer), slots, slots, positions, num_tokens)
                times[0].append(self._time(self._attention.attention, step))
                block = BlockId(BlockKind.EXPERTS, layer)
                times[1].append(self._time(self._experts.experts, ExpertsStep(block, rows, ids, weights, [])))
            times[2].append(self._time(self._attention.sample, head, self._sampling, generated))
        first = len(self._layers)  # the first pass warms up
        return PassTimes(trimmed_mean(times[0][first:]), trimmed_mean(times[1][first:]), trimmed_mean(times[2][1:]))

    def _expert_ids(self, active: int, pairs: int) -> Int16Array:
        """[n, K] of tokens that give `active` experts `pairs` pairs each."""
        width = min(self._checkpoint.top_k, active)
        count = active * pairs // width
        ids = np.full((count, self._checkpoint.top_k), -1, np.int16)
        chosen = self._rng.permutation(self._checkpoint.num_experts)[:active]
        ids[:, :width] = chosen[np.arange(count * width) % active].reshape(-1, width)
        return ids

    def _time(self, run: Callable[..., Any], *args: Any) -> float:
        start = time.perf_counter()
        run(*args)
        self._synchronize()
        return time.perf_counter() - start


def attention_and_head(
    kernels: Kernels, checkpoint: ModelConfig, token_counts: Sequence[int]
) -> tuple[list[Point], list[Point]]:
    """Points of both, while the experts compute what so many tokens give them."""
    attention, head = [], []
    for tokens in token_counts:
        active = min(checkpoint.num_experts, tokens * checkpoint.top_k)
        pairs = max(1, tokens * checkpoint.top_k // active)
        times = [kernels.passes(tokens, context, active, pairs) for context in CONTEXTS]
        attention += [
            {"tokens": tokens, "context": context, "seconds": time.attention}
            for context, time in zip(CONTEXTS, times, strict=True)
        ]
        head.append({"tokens": tokens, "seconds": statistics.fmean(time.head for time in times)})
    return attention, head


def fit_experts(kernels: Kernels, checkpoint: ModelConfig) -> tuple[float, list[Point]]:
    """Fixed seconds of a step, and each expert's own: slope and intercept over the number of active experts."""
    top_k, num_experts = checkpoint.top_k, checkpoint.num_experts
    actives = sorted({1, top_k, num_experts // 2, num_experts})
    fixed, per_expert = [], []
    for pairs in PAIRS_PER_EXPERT:
        seconds = []
        for active in actives:
            tokens = min(max(TOKENS), max(1, active * pairs // top_k))
            seconds.append(kernels.passes(tokens, CONTEXTS[0], active, pairs).experts)
        slope, intercept = np.polyfit(actives, seconds, 1)
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
            if worker._attention is not None:
                self._watch(worker._attention._blocks, "attention", "sample")
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
            seen: list[BlockStep] = []
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
    """Means over powers of two of tokens."""
    groups: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for count, seconds in samples:
        if count:
            groups[round(np.log2(count))].append((count, seconds))
    points = [
        {"tokens": statistics.fmean(n for n, _ in group), "seconds": trimmed_mean(s for _, s in group)}
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


def measure(
    config: EngineConfig,
    placement: PlacementConfig,
    repeats: int,
    name: str,
    token_counts: Sequence[int] = TOKENS,
    host_tokens: Sequence[int] = HOST_TOKENS,
) -> dict[str, Any]:
    """The object of a measured profile. `config` is of one worker; `placement` is that of the host's time."""
    checkpoint = load_model_config(config.model)
    with torch.inference_mode():
        kernels = Kernels(config, checkpoint, repeats)
        attention, head = attention_and_head(kernels, checkpoint, token_counts)
        fixed, per_expert = fit_experts(kernels, checkpoint)
        kernels.close()
    hosts: dict[BlockKind, list[tuple[int, float]]] = defaultdict(list)
    for num_tokens in host_tokens:
        for kind, samples in measure_host(replace(config, placement=placement), num_tokens).items():
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


def profile_config(model: str, device: str, threads: int) -> EngineConfig:
    """Of the worker that is measured."""
    most = max(TOKENS)
    # The slab has a place for each token of a step of experts, though only so many sequences run.
    return EngineConfig(
        model=model,
        device=device,
        threads_per_worker=threads,
        scheduler=SchedulerConfig(schedule="waves", max_num_seqs=most, max_num_batched_tokens=4096),
        cache=CacheConfig(num_blocks=most * BLOCKS_OF_SEQUENCE, block_size=BLOCK_SIZE, enable_prefix_caching=False),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", default=str(builtin_model_path()))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--placement", default="1", type=parse_placement, help="of the host's time: 1, 2, 1A+1E, ...")
    parser.add_argument("--repeats", type=int, default=48, help="runs of a block behind each mean")
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

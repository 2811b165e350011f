"""Where the time of a worker's step goes: kernels, and the Python around them, by kind of block and number of tokens.

    python -m benchmarks.step_time [--model DIR] [--device cpu] [--tokens 1,16,256] [--placement P,...]
        [--schedule S] [--json FILE]

A step is one turn of the worker's loop: poll, schedule, gather, run a block, dispatch, bookkeeping. *Kernels* is the
time inside the model's blocks (embedding, attention, experts, logits); *host* is all the rest of the turn, the gathers
and the sampler included. All sequences decode; the workers of a placement share this process and are stepped in turn,
but exchange tokens through the shared-memory transport. Medians over turns that ran a block on exactly n tokens; the
10th percentile says what the host costs when nobody disturbs it. On an emulated device (`--device emulated:h100`)
*kernels* is the modelled time, and `--placement 8` (colocated workers) or `2A+2E` asks for other placements. In the
schedule `forward`, which one worker has by default, a step is an iteration: all blocks, and the sampler.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from amoe.builtin import builtin_model_path
from amoe.cluster.local import ring_bytes_for
from amoe.config import SCHEDULES, CacheConfig, EngineConfig, PlacementConfig, SchedulerConfig
from amoe.core.steps import ForwardStep, Step
from amoe.engine.build import build_worker
from amoe.engine.control import encode_frame
from amoe.engine.emulated import EmulatedAttention, EmulatedExperts, Waiter
from amoe.engine.emulated_device import served_shape
from amoe.engine.executor import AttentionExecutor, ExpertsExecutor
from amoe.engine.forward import ForwardExecutor
from amoe.engine.messages import AddRequest, ToServer, ToWorker
from amoe.engine.worker import Worker
from amoe.models.worker_model import WorkerModel
from amoe.transport.shm_fabric import ShmFabric
from amoe.types import SamplingParams

BLOCKS = ("embed", "attention", "experts", "forward", "head")


class NoControl:
    """A control port that takes the prepared messages; what is said is encoded, as it costs, and forgotten."""

    def __init__(self) -> None:
        self.inbox: list[ToWorker] = []

    def receive(self) -> list[ToWorker]:
        messages, self.inbox = self.inbox, []
        return messages

    def send(self, message: ToServer) -> None:
        encode_frame(message)

    def fileno(self) -> int:
        raise NotImplementedError("nobody waits here")


class Watch(Protocol):
    """Seconds of kernels since the last reset."""

    @property
    def seconds(self) -> float: ...

    def reset(self) -> None: ...


class ModelledWatch:
    """Of an emulated device."""

    def __init__(self, waiter: Waiter) -> None:
        self._waiter = waiter
        self.reset()

    @property
    def seconds(self) -> float:
        return self._waiter.modelled_s - self._start

    def reset(self) -> None:
        self._start = self._waiter.modelled_s


class Stopwatch:
    """Of the blocks of a model."""

    def __init__(self, model: WorkerModel, synchronize: Callable[[], None]) -> None:
        self.seconds = 0.0
        self._synchronize = synchronize
        for name in BLOCKS:
            setattr(model, name, self._timed(getattr(model, name)))

    def reset(self) -> None:
        self.seconds = 0.0

    def _timed(self, block: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **named: Any) -> Any:
            start = time.perf_counter()
            out = block(*args, **named)
            self._synchronize()
            self.seconds += time.perf_counter() - start
            return out

        return run


def _watches(workers: list[Worker], synchronize: Callable[[], None]) -> list[Watch]:
    """One for each model or device: a worker that holds attention and experts has one of both."""
    models: dict[int, WorkerModel] = {}
    waiters: dict[int, Waiter] = {}
    for worker in workers:
        blocks = worker._attention._blocks if worker._attention is not None else None
        for executor in (worker._experts, blocks, worker._forward):
            if isinstance(executor, AttentionExecutor | ExpertsExecutor | ForwardExecutor):
                models[id(executor._model)] = executor._model
            elif isinstance(executor, EmulatedAttention | EmulatedExperts):
                waiters[id(executor.waiter)] = executor.waiter
    stopwatches: list[Watch] = [Stopwatch(model, synchronize) for model in models.values()]
    return [*stopwatches, *(ModelledWatch(waiter) for waiter in waiters.values())]


def parse_placement(text: str) -> PlacementConfig:
    """`1` for one worker, `8` for eight colocated ones, `2A+2E` for workers of either kind."""
    match = re.fullmatch(r"(\d+)A\+(\d+)E|(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no placement such as 8 or 2A+2E")
    if match[3]:
        return PlacementConfig(colocated=int(match[3])) if int(match[3]) > 1 else PlacementConfig()
    return PlacementConfig(attention_workers=int(match[1]), expert_workers=int(match[2]))


def _note(seen: list[tuple[str, int]], step: Step, *_: object) -> None:
    kind = "forward" if isinstance(step, ForwardStep) else step.block.kind.name.lower()
    seen.append((kind, step.num_tokens))


def measure(config: EngineConfig, num_tokens: int, num_new: int) -> dict[str, tuple[float, float, float, int]]:
    """Median kernel and host microseconds, the host's 10th percentile, and the number of steps, by kind of block."""
    ranks = range(config.placement.num_workers)
    fabric = ShmFabric.create(len(ranks), ring_bytes_for(config, served_shape(config)))
    controls = [NoControl() for _ in ranks]
    transports = [fabric.endpoint(rank) for rank in ranks]
    workers = [build_worker(config, rank, transports[rank], controls[rank]) for rank in ranks]
    synchronize = torch.cuda.synchronize if config.device.startswith("cuda") else (lambda: None)
    watches = _watches(workers, synchronize)
    params = SamplingParams(max_tokens=num_new, temperature=0.0, ignore_eos=True)
    for rank in config.placement.attention_ranks:
        controls[rank].inbox = [AddRequest(i, [5 + i % 50, 7, 9 + i % 70, 11], params) for i in range(num_tokens)]
    samples: dict[str, list[tuple[float, float]]] = defaultdict(list)
    idle = 0
    while idle < 100:
        for worker in workers:
            seen: list[tuple[str, int]] = []
            worker.stats.observe = partial(_note, seen)  # type: ignore[method-assign]
            worker.stats.observe_forward = partial(_note, seen)  # type: ignore[method-assign]
            for watch in watches:
                watch.reset()
            start = time.perf_counter()
            worker.turn()
            elapsed = time.perf_counter() - start
            idle = 0 if seen else idle + 1
            # Experts with several homes see what the router sends them.
            counts = len(config.placement.attention_ranks) > 1 and bool(seen) and seen[0][0] == "experts"
            if counts or (seen and seen[0][1] == num_tokens):
                kernels = sum(watch.seconds for watch in watches)
                samples[seen[0][0]].append((kernels * 1e6, (elapsed - kernels) * 1e6))
    for transport in transports:
        transport.close()
    fabric.close()
    return {
        kind: (
            statistics.median(k for k, _ in pairs),
            statistics.median(h for _, h in pairs),
            statistics.quantiles((h for _, h in pairs), n=10)[0],
            len(pairs),
        )
        for kind, pairs in samples.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(builtin_model_path()))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", default="1,16,256")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--placement", default="1,1A+1E", help="comma-separated: 8 is colocated, 2A+2E is not")
    parser.add_argument("--schedule", choices=SCHEDULES, default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    print("| placement | tokens | block | kernels µs | host µs | host p10 µs | steps |\n|---|---|---|---|---|---|---|")
    for name, placement in ((name, parse_placement(name)) for name in args.placement.split(",")):
        for num_tokens in map(int, args.tokens.split(",")):
            config = EngineConfig(
                model=args.model,
                device=args.device,
                threads_per_worker=args.threads,
                placement=placement,
                scheduler=SchedulerConfig(schedule=args.schedule, max_num_seqs=num_tokens, max_num_batched_tokens=2048),
                cache=CacheConfig(num_blocks=8 * num_tokens + 64),
            )
            for kind, (kernels, host, low, steps) in measure(config, num_tokens, args.new_tokens).items():
                print(
                    f"| {name} | {num_tokens} | {kind} | {kernels:.0f} | {host:.0f} | {low:.0f} | {steps} |", flush=True
                )
                rows.append(
                    {
                        "placement": name,
                        "tokens": num_tokens,
                        "block": kind,
                        "kernels_us": kernels,
                        "host_us": host,
                        "host_p10_us": low,
                    }
                )
    if args.json:
        args.json.write_text(json.dumps({"device": args.device, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

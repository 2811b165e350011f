"""Where the time of a worker's step goes: kernels, and the Python around them, by kind of block and number of tokens.

    python -m benchmarks.step_time [--model DIR] [--device cpu] [--tokens 1,16,256] [--json FILE]

A step is one turn of the worker's loop: poll, schedule, gather, run a block, dispatch, bookkeeping. *Kernels* is the
time inside the model's blocks (embedding, attention, experts, logits); *host* is all the rest of the turn, the gathers
and the sampler included. All sequences decode; the workers of a placement share this process and are stepped in turn,
but exchange tokens through the shared-memory transport. Medians over turns that ran a block on exactly n tokens; the
10th percentile says what the host costs when nobody disturbs it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from amoe.builtin import builtin_model_path
from amoe.cluster.local import ring_bytes_for
from amoe.config import CacheConfig, EngineConfig, PlacementConfig, SchedulerConfig
from amoe.core.steps import Step
from amoe.engine.build import build_worker
from amoe.engine.control import encode_frame
from amoe.engine.messages import AddRequest, ToServer, ToWorker
from amoe.engine.worker import Worker
from amoe.models.config import load_model_config
from amoe.models.model import Model
from amoe.transport.shm import ShmFabric
from amoe.types import SamplingParams

PLACEMENTS = {"1 worker": PlacementConfig(), "1A + 1E": PlacementConfig(expert_workers=1)}
BLOCKS = ("embed", "attention", "experts", "head")


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


class Stopwatch:
    """Seconds spent in the blocks of a model since the last reset."""

    def __init__(self, model: Model, synchronize: Callable[[], None]) -> None:
        self.seconds = 0.0
        self._synchronize = synchronize
        for name in BLOCKS:
            setattr(model, name, self._timed(getattr(model, name)))

    def _timed(self, block: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = time.perf_counter()
            out = block(*args)
            self._synchronize()
            self.seconds += time.perf_counter() - start
            return out

        return run


def _model_of(worker: Worker) -> Model:
    executor = worker._experts if worker._experts is not None else worker._home._executor  # type: ignore[union-attr]
    return executor._model


def _note(seen: list[tuple[str, int]], step: Step, _seconds: float) -> None:
    seen.append((step.block.kind.name.lower(), step.num_tokens))


def measure(config: EngineConfig, num_tokens: int, num_new: int) -> dict[str, tuple[float, float, float, int]]:
    """Median kernel and host microseconds, the host's 10th percentile, and the number of steps, by kind of block."""
    ranks = range(config.placement.num_workers)
    fabric = ShmFabric.create(len(ranks), ring_bytes_for(config, load_model_config(config.model)))
    controls = [NoControl() for _ in ranks]
    transports = [fabric.endpoint(rank) for rank in ranks]
    workers = [build_worker(config, rank, transports[rank], controls[rank]) for rank in ranks]
    synchronize = torch.cuda.synchronize if config.device.startswith("cuda") else (lambda: None)
    watches = [Stopwatch(model, synchronize) for model in {id(m): m for m in map(_model_of, workers)}.values()]
    params = SamplingParams(max_tokens=num_new, temperature=0.0, ignore_eos=True)
    controls[0].inbox = [AddRequest(i, [5 + i % 50, 7, 9 + i % 70, 11], params) for i in range(num_tokens)]
    samples: dict[str, list[tuple[float, float]]] = defaultdict(list)
    idle = 0
    while idle < 100:
        for worker in workers:
            seen: list[tuple[str, int]] = []
            worker.stats.observe = partial(_note, seen)  # type: ignore[method-assign]
            for watch in watches:
                watch.seconds = 0.0
            start = time.perf_counter()
            worker.turn()
            elapsed = time.perf_counter() - start
            idle = 0 if seen else idle + 1
            if seen and seen[0][1] == num_tokens:
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
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    print("| placement | tokens | block | kernels µs | host µs | host p10 µs | steps |\n|---|---|---|---|---|---|---|")
    for name, placement in PLACEMENTS.items():
        for num_tokens in map(int, args.tokens.split(",")):
            config = EngineConfig(
                model=args.model,
                device=args.device,
                threads_per_worker=args.threads,
                placement=placement,
                scheduler=SchedulerConfig(max_num_seqs=num_tokens, max_num_batched_tokens=2048),
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

"""The rounds of the served comparison, and what a server takes: memory, start, reads."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from amoe.bench.report import memory_bandwidth
from amoe.clock import MonotonicClock
from benchmarks.peers import memory
from benchmarks.peers.http_client import ServedRun, send_all
from benchmarks.peers.servers import Server, ServerPlan
from benchmarks.peers.systems import WARMUP
from benchmarks.peers.timing import Point

_FIRST = Point(batch=1, input_len=64, output_len=1)
_SETTLE_S = 2.0
_SAMPLE_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedSample:
    """One run of one server; `round` and `memory_bandwidth` as in `Sample`."""

    system: str
    point: Point
    round: int
    run: ServedRun
    memory_bandwidth: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """What a server takes. Bytes, over all its processes.

    Attributes:
        ready_s, first_token_s: from the start until it was healthy, and until the first token was there.
        idle, busy: memory before the load, and the most of it under the load.
        checkpoint: bytes of the model's files, which were not in the page cache at the start.
        read_calls, read_storage: that the server had read when it was ready.
    """

    system: str
    ready_s: float
    first_token_s: float
    idle: memory.Usage
    busy: memory.Usage
    checkpoint: int
    read_calls: int
    read_storage: int


@dataclass(kw_only=True)
class ServedRounds:
    """Runs every point on every server, `num_rounds` times in turn; each is started anew in every round.

    Attributes:
        threads: of the probe of memory.
        samples: what was measured until now.
    """

    plans: Sequence[ServerPlan]
    points: Sequence[Point]
    num_rounds: int
    repeats: int
    vocab_size: int
    seed: int
    threads: int
    note: Callable[[str], None]
    samples: list[ServedSample] = field(default_factory=list)

    def run(self) -> list[ServedSample]:
        """All rounds.

        Raises:
            AmoeError: a server failed.
        """
        for number in range(self.num_rounds):
            for plan in self.plans if number % 2 == 0 else tuple(reversed(self.plans)):
                self.note(f"{plan.name}: starting its server")
                with Server(plan) as server:
                    self._send(server, WARMUP, (self.seed,))
                    for point in self.points:
                        for repeat in range(self.repeats):
                            self._measure(server, point, number, repeat)
        return self.samples

    def _measure(self, server: Server, point: Point, number: int, repeat: int) -> None:
        bandwidth = memory_bandwidth(MonotonicClock(), self.threads)
        run = self._send(server, point, (self.seed, number, repeat, *point.key))
        name = server.plan.name
        self.samples.append(ServedSample(system=name, point=point, round=number, run=run, memory_bandwidth=bandwidth))
        self.note(
            f"round {number + 1}: {name} served, {point.batch} at once: {run.end_to_end:.1f} tok/s, TTFT "
            f"{run.ttft_p50_ms:.0f} ms, TPOT {run.tpot_p50_ms:.1f} ms at {bandwidth / 1e9:.0f} GB/s"
        )

    def _send(self, server: Server, point: Point, seed: tuple[int, ...]) -> ServedRun:
        prompts = point.prompts(np.random.default_rng(seed), self.vocab_size)
        return asyncio.run(send_all(server.port, server.plan.model, point, prompts))


def footprint(plan: ServerPlan, load: Point, vocab_size: int) -> Footprint:
    """Start a server whose checkpoint is not in memory, and watch it under a load.

    Raises:
        AmoeError: it failed, or this is not Linux.
    """
    size = memory.forget_pages(plan.files)
    rng = np.random.default_rng(0)
    with Server(plan) as server:
        asyncio.run(send_all(server.port, plan.model, _FIRST, _FIRST.prompts(rng, vocab_size)))
        first_token_s = time.monotonic() - server.started_at
        after_start = memory.usage(server.pid)
        asyncio.run(send_all(server.port, plan.model, WARMUP, WARMUP.prompts(rng, vocab_size)))
        time.sleep(_SETTLE_S)
        idle = memory.usage(server.pid)
        busy = _most_under(server, load, load.prompts(rng, vocab_size))
        return Footprint(
            system=plan.name,
            ready_s=server.ready_s,
            first_token_s=first_token_s,
            idle=idle,
            busy=busy,
            checkpoint=size,
            read_calls=after_start.read_calls,
            read_storage=after_start.read_storage,
        )


def _most_under(server: Server, load: Point, prompts: list[list[int]]) -> memory.Usage:
    """The sample of greatest PSS while the load runs. Sampling slows the server down: nothing else is measured then."""
    samples: list[memory.Usage] = []
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(_SAMPLE_S):
            samples.append(memory.usage(server.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        asyncio.run(send_all(server.port, server.plan.model, load, prompts))
    finally:
        is_over.set()
        watcher.join()
    samples.append(memory.usage(server.pid))
    return max(samples, key=lambda sample: sample.pss)

"""The steady state of the real engine under a closed loop, measured as the simulator measures it.

C sequences are always under way; the first C are met at random points of their lives, so that ends and prompts spread
evenly from the start. After a warm-up the window opens, and closes when every sequence has had so many tokens more.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from amoe.cluster.front import running_engine
from amoe.config import EngineConfig
from amoe.engine.async_engine import AsyncEngine
from amoe.sim.config import Window
from amoe.sim.workload import RequestSource, Workload
from amoe.stats import WorkerStats


@dataclass(frozen=True, kw_only=True, slots=True)
class Steady:
    """One run.

    Attributes:
        tokens_per_s: slope of the tokens sampled in the window, see `slope`.
        itl_s: mean gap between two tokens of a sequence.
        host_s: host time of a step: the time of a turn of the loop less what its kernels were modelled to take
            (emulated devices only, else of no meaning).
        step_s: the whole time of a step.
        worker_step_s: the same of each worker, by rank.
        server_cpu: cores that this process, the server's side, kept busy meanwhile.
        foreign_cpu: cores that other processes of the machine kept busy.
    """

    tokens_per_s: float
    itl_s: float
    window_s: float
    host_s: float
    step_s: float
    worker_step_s: tuple[float, ...]
    server_cpu: float
    foreign_cpu: float


@dataclass(slots=True)
class _Tally:
    """Counts tokens as they come."""

    open_at: int
    close_at: int
    num_tokens: int = 0
    opened: float | None = None
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    closed_at: float = 0.0
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    on_open: asyncio.Event = field(default_factory=asyncio.Event)

    def count(self, now: float, last: float | None, num_tokens: int) -> None:
        """`num_tokens` tokens of a sequence have come, whose last ones came at `last`."""
        if self.closed.is_set():
            return
        self.num_tokens += num_tokens
        if self.opened is not None:
            self.times.append(now)
            self.counts.append(num_tokens)
            if last is not None:
                self.gaps += [(now - last) / num_tokens] * num_tokens
        elif self.num_tokens >= self.open_at:
            self.opened = now
            self.on_open.set()
        if self.num_tokens >= self.close_at:
            self.closed_at = now
            self.closed.set()


def slope(times: Sequence[float], counts: Sequence[int]) -> float:
    """Tokens per second: the line through the number of tokens so far.

    Tokens come in bursts, one per iteration, and a window of a dozen iterations holds one more or less by chance:
    tokens divided by seconds would be wrong by as much.

    Args:
        times: [n] seconds, ascending, at which `counts` [n] tokens came.
    """
    weights = np.asarray(counts, np.float64)
    so_far = weights.cumsum() - weights / 2
    return float(np.polyfit(np.asarray(times) - times[0], so_far, 1, w=np.sqrt(weights))[0])


async def _sequences(engine: AsyncEngine, source: RequestSource, tally: _Tally) -> None:
    """One place of the closed loop: a request after the other."""
    while not tally.closed.is_set():
        request, last = source.draw(), None
        params = replace(request.params, temperature=0.0)
        async for delta in engine.generate(request.prompt_token_ids.tolist(), params):
            if delta.token_ids:
                now = time.monotonic()
                tally.count(now, last, len(delta.token_ids))
                last = now


@dataclass(frozen=True, slots=True)
class _Cpu:
    """Seconds of processor time so far: of the machine, of this process, and of it and the workers together."""

    at: float
    machine: float
    server: float
    ours: float

    @classmethod
    def now(cls, pids: Sequence[int]) -> _Cpu:
        """Reads /proc."""
        ticks = os.sysconf("SC_CLK_TCK")
        user, nice, system, _idle, _iowait, irq, softirq, *_ = _numbers("/proc/stat", 1)
        ours = sum(sum(_numbers(f"/proc/{pid}/stat", 13)[:2]) for pid in pids)
        return cls(time.monotonic(), (user + nice + system + irq + softirq) / ticks, time.process_time(), ours / ticks)

    def server_since(self, before: _Cpu) -> float:
        """Cores that this process used."""
        return (self.server - before.server) / (self.at - before.at)

    def foreign_since(self, before: _Cpu) -> float:
        """Cores that others used."""
        return max(0.0, (self.machine - before.machine - self.ours + before.ours) / (self.at - before.at))


def _numbers(path: str, first: int) -> list[int]:
    """The numbers of the file's first line, from a field on. A process's name may hold spaces, but ends with `)`."""
    line = Path(path).read_text().split("\n", 1)[0]
    name, closing, rest = line.rpartition(")")
    fields = [name, closing, *rest.split()] if closing else line.split()
    return [int(field) for field in fields[first:]]


@dataclass(frozen=True, slots=True)
class _Steps:
    """Steps of one worker between two heartbeats."""

    count: int
    busy_s: float
    modelled_s: float

    @classmethod
    def between(cls, before: WorkerStats, after: WorkerStats) -> _Steps:
        return cls(
            max(1, after.steps - before.steps), after.busy_s - before.busy_s, after.modelled_s - before.modelled_s
        )


def raise_priority(pids: Sequence[int], nice: int) -> None:
    """Let the sessions of these processes go before others (negative `nice`; needs privileges), on a shared machine."""
    for pid in pids:
        if nice:
            Path(f"/proc/{pid}/autogroup").write_text(str(nice))


async def measure_steady(
    config: EngineConfig, workload: Workload, window: Window, vocab_size: int, nice: int = 0
) -> Steady:
    """Start the workers of `config`, run the closed loop, stop them.

    Args:
        window: in iterations.
        vocab_size: prompts are random ids below it.
        nice: see `raise_priority`.
    """
    concurrency = workload.concurrency
    assert concurrency is not None and window.unit == "iterations"
    source = RequestSource(workload, vocab_size, np.random.default_rng(0))
    tally = _Tally(round(window.warmup * concurrency), round((window.warmup + window.length) * concurrency))
    async with running_engine(config) as (engine, cluster):
        pids = [os.getpid(), *cluster.pids]
        raise_priority(cluster.pids, nice)
        tasks = [asyncio.create_task(_sequences(engine, source, tally)) for _ in range(concurrency)]
        await tally.on_open.wait()
        cpu, before = _Cpu.now(pids), dict(engine.metrics.workers)
        await tally.closed.wait()
        cpu_after, after = _Cpu.now(pids), dict(engine.metrics.workers)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert tally.opened is not None
    steps = [_Steps.between(before[rank], after[rank]) for rank in sorted(after)]
    count, busy_s = sum(worker.count for worker in steps), sum(worker.busy_s for worker in steps)
    return Steady(
        tokens_per_s=slope(tally.times, tally.counts),
        itl_s=statistics.fmean(tally.gaps),
        window_s=tally.closed_at - tally.opened,
        host_s=(busy_s - sum(worker.modelled_s for worker in steps)) / count,
        step_s=busy_s / count,
        worker_step_s=tuple(worker.busy_s / worker.count for worker in steps),
        server_cpu=cpu_after.server_since(cpu),
        foreign_cpu=cpu_after.foreign_since(cpu),
    )

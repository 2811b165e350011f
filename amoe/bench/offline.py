"""Runs the engine, its worker processes included, without HTTP; and compares schedules in interleaved rounds."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from amoe.bench.load import LoadGenerator, LoadResult, Progress
from amoe.bench.record import RequestRecord, summarise
from amoe.bench.report import Round, memory_bandwidth
from amoe.bench.workload import RequestSpec
from amoe.clock import Clock
from amoe.cluster.front import running_engine
from amoe.config import SCHEDULES, EngineConfig, ScheduleName, SchedulerConfig
from amoe.engine.async_engine import AsyncEngine
from amoe.engine.worker import HEARTBEAT_S
from amoe.errors import AmoeError, ConfigError
from amoe.types import SamplingParams

Pairs = npt.NDArray[np.float64]

PROBE_THREADS = 2


class Delta(Protocol):
    """New tokens of one sequence."""

    @property
    def token_ids(self) -> list[int]: ...


class Generator(Protocol):
    """What the benchmark needs of an engine."""

    def generate(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> AsyncIterator[Delta]:
        """The deltas of one sequence, until it ends."""
        ...


class EngineSender:
    """Sends requests to an engine in this process.

    Args:
        engine: where to.
        params: of every request; `max_tokens` comes from the request.
    """

    def __init__(self, engine: Generator, clock: Clock, params: SamplingParams) -> None:
        self._engine = engine
        self._clock = clock
        self._params = params

    async def send(self, spec: RequestSpec, record: RequestRecord) -> None:
        """Generate, and note in `record` what comes and when.

        Raises:
            TypeError: if the prompt is text.
        """
        if isinstance(spec.prompt, str):
            raise TypeError("an engine takes token ids")
        record.prompt_tokens = len(spec.prompt)
        params = replace(self._params, max_tokens=spec.max_tokens)
        try:
            async for delta in self._engine.generate(spec.prompt, params):
                if delta.token_ids:
                    record.arrivals.append(self._clock.now())
                    record.tokens.append(len(delta.token_ids))
                    record.output_tokens += len(delta.token_ids)
        except AmoeError as error:
            record.failure = f"{type(error).__name__}: {error}"


async def _expert_pairs(engine: AsyncEngine) -> Pairs:
    """[num_layers, num_experts] (token, expert) pairs that all workers together have computed."""
    await asyncio.sleep(2 * HEARTBEAT_S)  # statistics come with heartbeats
    workers = engine.metrics.workers.values()
    per_worker = [np.asarray(stats.expert_pairs, np.float64) for stats in workers if stats.expert_pairs]
    return sum(per_worker, np.zeros((1, 1)))


def expert_imbalance(pairs: Pairs) -> float:
    """Greatest over mean of each layer, averaged over the layers that have any. pairs: [num_layers, num_experts]."""
    used = pairs[pairs.sum(axis=1) > 0]
    return float((used.max(axis=1) / used.mean(axis=1)).mean()) if len(used) else float("nan")


@dataclass(frozen=True, slots=True)
class Variant:
    """A schedule to measure; `count`: how many waves (None: automatic), or micro-batches of lockstep (None: 1)."""

    schedule: ScheduleName
    count: int | None = None

    def __str__(self) -> str:
        return self.schedule if self.count is None else f"{self.schedule}:{self.count}"

    def apply(self, config: SchedulerConfig) -> SchedulerConfig:
        """The same configuration, with this schedule."""
        if self.schedule == "waves":
            return replace(config, schedule="waves", num_waves=self.count, micro_batches=1)
        return replace(config, schedule=self.schedule, num_waves=None, micro_batches=self.count or 1)

    @classmethod
    def of(cls, config: SchedulerConfig) -> Variant:
        """The schedule of a configuration."""
        if config.schedule == "waves":
            return cls("waves", config.num_waves)
        return cls(config.schedule, config.micro_batches if config.micro_batches > 1 else None)

    @classmethod
    def parse(cls, text: str) -> Variant:
        """`progress`, `waves:3` for three waves, or `lockstep:2` for two micro-batches.

        Raises:
            ConfigError: there is no such schedule, or it takes no such number.
        """
        name, _, count = text.partition(":")
        if name not in SCHEDULES or not (count or "1").isdigit():
            raise ConfigError(f"{text!r} is none of {', '.join(SCHEDULES)}, nor one like waves:3 or lockstep:2")
        variant = cls(name, int(count) if count else None)  # type: ignore[arg-type]
        return cls.of(variant.apply(SchedulerConfig()))


@dataclass(frozen=True, kw_only=True, slots=True)
class OfflinePlan:
    """One measurement.

    Attributes:
        warmup, specs: requests, prompts as token ids; those of the warm-up are not measured.
        concurrency: requests under way.
        params: of every request.
    """

    warmup: list[RequestSpec]
    specs: list[RequestSpec]
    concurrency: int
    params: SamplingParams


async def measure(engine: Generator, plan: OfflinePlan, clock: Clock, progress: Progress | None = None) -> LoadResult:
    """Warm up, then measure."""
    send = EngineSender(engine, clock, plan.params).send
    if plan.warmup:
        warmed = await LoadGenerator(send, clock).with_concurrency(plan.warmup, plan.concurrency)
        if warmed.interrupted:
            return LoadResult([], interrupted=True)
    return await LoadGenerator(send, clock, progress).with_concurrency(plan.specs, plan.concurrency)


async def run_rounds(
    config: EngineConfig,
    variants: Sequence[Variant],
    num_rounds: int,
    plan: OfflinePlan,
    clock: Clock,
    make_progress: Callable[[str], contextlib.AbstractContextManager[Progress]],
    on_pairs: Callable[[Pairs], None] = lambda pairs: None,
) -> list[Round]:
    """Measure each variant once per round, each time with fresh workers. Interrupted, it returns what it has.

    Args:
        make_progress: display of one run, given its title.
        on_pairs: told after each run how many pairs every expert has computed, [num_layers, num_experts].
    """
    rounds: list[Round] = []
    for number in range(num_rounds):
        # Every other round runs backwards, so that a drift of the machine favours nobody.
        for variant in variants if number % 2 == 0 else tuple(reversed(variants)):
            run_config = replace(config, scheduler=variant.apply(config.scheduler))
            title = f"{variant}, round {number + 1}/{num_rounds}"
            bandwidth = memory_bandwidth(clock, PROBE_THREADS)
            try:
                async with running_engine(run_config) as (engine, _):
                    with make_progress(title) as progress:
                        result = await measure(engine, plan, clock, progress)
                    imbalance = float("nan")
                    if not result.interrupted:
                        pairs = await _expert_pairs(engine)
                        imbalance = expert_imbalance(pairs)
                        on_pairs(pairs)
            except asyncio.CancelledError:  # while workers start or stop
                return rounds
            if result.records:
                figures = summarise(result.records)
                rounds.append(
                    Round(
                        variant=str(variant),
                        number=number,
                        figures=figures,
                        memory_bandwidth=bandwidth,
                        expert_imbalance=imbalance,
                    )
                )
            if result.interrupted:
                return rounds
    return rounds

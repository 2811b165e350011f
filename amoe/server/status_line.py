"""One line every ten seconds about what the server does, while it does something."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from amoe.engine.async_engine import AsyncEngine
from amoe.stats import FlowSample, WorkerStats

logger = logging.getLogger("amoe.status")

INTERVAL_S = 10.0


@dataclass(frozen=True, slots=True)
class Totals:
    """Cumulative counts at one moment.

    Attributes:
        expert_pairs: [num_layers, num_experts] over all workers; None before the first heartbeat.
        expert_ranks: of the workers whose counts these are.
    """

    at_s: float
    prompt_tokens: int
    generated_tokens: int
    prefix_queries: int
    prefix_hits: int
    expert_pairs: npt.NDArray[np.int64] | None
    expert_ranks: frozenset[int]


def totals_of(flow: FlowSample, workers: Sequence[WorkerStats]) -> Totals:
    """The counts of now."""
    pairs = [np.asarray(worker.expert_pairs, np.int64) for worker in workers if worker.expert_pairs]
    return Totals(
        flow.at_s,
        flow.prompt_tokens,
        flow.generated_tokens,
        sum(worker.prefix_queries for worker in workers),
        sum(worker.prefix_hits for worker in workers),
        np.sum(pairs, axis=0) if pairs else None,
        frozenset(worker.rank for worker in workers if worker.expert_pairs),
    )


def hottest_layer(before: Totals, now: Totals) -> tuple[int, float] | None:
    """The layer whose busiest expert took most, and its pairs divided by the mean expert's; None: nobody can say.

    The counts are of workers that are present. One that has left, or begins anew, takes its counts along, and no
    difference says anything then.
    """
    if now.expert_pairs is None or not before.expert_ranks <= now.expert_ranks:
        return None
    pairs = now.expert_pairs if before.expert_pairs is None else now.expert_pairs - before.expert_pairs
    means = pairs.mean(axis=1)
    if not means.any() or pairs.min() < 0:
        return None
    imbalance = np.divide(pairs.max(axis=1), means, out=np.zeros_like(means), where=means > 0)
    layer = int(imbalance.argmax())
    return layer, float(imbalance[layer])


def status_line(before: Totals, now: Totals, workers: Sequence[WorkerStats]) -> str:
    """What a person wants to know at a glance."""
    seconds = max(1e-3, now.at_s - before.at_s)
    homes = [worker for worker in workers if worker.kv_blocks_total]
    usage = sum(worker.kv_blocks_used for worker in homes) / max(1, sum(worker.kv_blocks_total for worker in homes))
    parts = [
        f"prompt throughput: {(now.prompt_tokens - before.prompt_tokens) / seconds:.1f} tokens/s",
        f"generation throughput: {(now.generated_tokens - before.generated_tokens) / seconds:.1f} tokens/s",
        f"running: {sum(worker.num_running for worker in workers)} reqs",
        f"waiting: {sum(worker.num_waiting for worker in workers)} reqs",
        f"KV cache usage: {usage:.1%}",
    ]
    queries = now.prefix_queries - before.prefix_queries
    if queries > 0:
        parts.append(f"prefix cache hit rate: {(now.prefix_hits - before.prefix_hits) / queries:.1%}")
    hottest = hottest_layer(before, now)
    if hottest is not None:
        parts.append(f"hottest experts: layer {hottest[0]}, {hottest[1]:.2f} times the mean")
    return ", ".join(parts)


def has_traffic(before: Totals, now: Totals, num_open: int) -> bool:
    """Something is open, or something has happened."""
    return num_open > 0 or (before.prompt_tokens, before.generated_tokens) != (now.prompt_tokens, now.generated_tokens)


async def log_status(engine: AsyncEngine, interval_s: float = INTERVAL_S) -> None:
    """Log the line, until cancelled; one more after the traffic has ended, then silence."""

    def look() -> tuple[Totals, list[WorkerStats]]:
        workers = list(engine.metrics.workers.values())
        return totals_of(engine.metrics.flow.now(asyncio.get_running_loop().time()), workers), workers

    before, _ = look()
    was_busy = False
    while True:
        await asyncio.sleep(interval_s)
        now, workers = look()
        is_busy = has_traffic(before, now, engine.num_open)
        if is_busy or was_busy:
            logger.info(status_line(before, now, workers))
        before, was_busy = now, is_busy

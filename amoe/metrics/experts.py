"""Series of experts: what they computed, how uneven it was, and what capacity took from them."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from amoe.stats import WorkerStats

Float64Array = npt.NDArray[np.float64]

SAMPLE_EVERY = 4  # heartbeats, which come every half second
NUM_SAMPLES = 6  # so the window is the last ten seconds


@dataclass(frozen=True, slots=True)
class _Sample:
    """Pairs so far: `by_expert` [L, E] over all workers, `by_worker` [W, L] over all experts."""

    by_expert: Float64Array
    by_worker: Float64Array


def imbalance(load: Float64Array) -> Float64Array:
    """Max over mean of each row of `load` [n, m]; 1 is balanced, NaN where a row is all 0."""
    mean = load.mean(axis=1)
    return np.divide(load.max(axis=1), mean, out=np.full(len(load), np.nan), where=mean > 0)


class ExpertLoad:
    """How uneven the load of experts has been in the last heartbeats.

    The window is counted in heartbeats of one worker, so that it needs no clock; totals are made only every
    `SAMPLE_EVERY` of them, because adding up 60 layers of 256 experts of many workers takes milliseconds.
    """

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque(maxlen=NUM_SAMPLES)
        self._beats = 0

    def beat(self, rank: int, workers: Mapping[int, WorkerStats], lost: Container[int] = ()) -> None:
        """A heartbeat of worker `rank` has come, and is in `workers`; those that are `lost` have no more."""
        owners = sorted(r for r, stats in workers.items() if stats.expert_pairs)
        if rank != next((owner for owner in owners if owner not in lost), None):
            return
        self._beats += 1
        if self._beats % SAMPLE_EVERY == 1:
            pairs = np.array([workers[owner].expert_pairs for owner in owners], np.float64)
            self._samples.append(_Sample(pairs.sum(axis=0), pairs.sum(axis=2)))

    def over_experts(self) -> dict[int, float]:
        """By layer: pairs of the busiest expert over those of the mean expert. Layers without pairs are left out."""
        return self._by_layer([sample.by_expert for sample in tuple(self._samples)])

    def over_workers(self) -> dict[int, float]:
        """By layer: pairs at the busiest expert worker over those at the mean one."""
        return self._by_layer([sample.by_worker.T for sample in tuple(self._samples)])

    @staticmethod
    def _by_layer(totals: list[Float64Array]) -> dict[int, float]:
        # A single sample is of all time: better than nothing, at the start.
        if not totals:
            return {}
        first, last = totals[0], totals[-1]
        recent = last if len(totals) == 1 or first.shape != last.shape else np.maximum(last - first, 0.0)
        return {layer: float(value) for layer, value in enumerate(imbalance(recent)) if not np.isnan(value)}


def load_families(workers: list[WorkerStats], load: ExpertLoad) -> Iterator[Metric]:
    """What the experts computed, and how uneven it was."""
    pairs = CounterMetricFamily(
        "amoe:expert_pairs", "(token, expert) pairs computed.", labels=("layer", "expert", "worker")
    )
    for worker in workers:
        for layer, row in enumerate(worker.expert_pairs):
            for expert, count in enumerate(row):
                if count:  # a worker holds some experts only, and cold ones need no series
                    pairs.add_metric((str(layer), str(expert), str(worker.rank)), count)
    yield pairs
    for name, documentation, values in (
        (
            "expert_load_imbalance",
            "Pairs of the busiest expert over those of the mean expert, in the last ten seconds.",
            load.over_experts(),
        ),
        (
            "worker_load_imbalance",
            "Pairs at the busiest expert worker over those at the mean one, in the last ten seconds.",
            load.over_workers(),
        ),
    ):
        family = GaugeMetricFamily(f"amoe:{name}", documentation, labels=("layer",))
        for layer, value in values.items():
            family.add_metric((str(layer),), value)
        yield family


def capacity_families(workers: list[WorkerStats]) -> Iterator[Metric]:
    """What capacity took. Nothing of workers where it is off."""
    lost = CounterMetricFamily(
        "amoe:capacity_pairs",
        "(token, expert) pairs that were dropped, or rerouted to other experts, by the expert that was spared.",
        labels=("layer", "expert", "action", "reason", "worker"),
    )
    over = CounterMetricFamily(
        "amoe:capacity_pairs_over",
        "Pairs computed beyond the capacity, in batches that were cut: of exact requests, or a token's best.",
        labels=("worker",),
    )
    mass = CounterMetricFamily(
        "amoe:capacity_gate_mass_lost",
        "Sum over tokens and layers of the part of the router's weight that was lost.",
        labels=("worker",),
    )
    tokens = CounterMetricFamily(
        "amoe:capacity_tokens", "Tokens times layers that capacity has looked at.", labels=("worker",)
    )
    for worker in workers:
        capacity, rank = worker.capacity, str(worker.rank)
        if capacity is None:
            continue
        for layer, expert, *counts in capacity.lost:
            for action, count in zip(("dropped", "rerouted"), counts, strict=True):
                if count:
                    lost.add_metric((str(layer), str(expert), action, capacity.reason, rank), count)
        over.add_metric((rank,), capacity.num_over)
        mass.add_metric((rank,), capacity.gate_mass_lost)
        tokens.add_metric((rank,), capacity.tokens)
    yield from (lost, over, mass, tokens)

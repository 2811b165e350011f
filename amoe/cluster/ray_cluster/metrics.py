"""The server's metrics in Ray's: what Ray's own Prometheus configuration scrapes then includes them.

`/metrics` of the server stays the truth: this is a copy of it, made every ten seconds, under the names `ray_amoe_...`
(Ray drops names with a colon without a word). Ray reckons sums of its histograms from the middles of buckets, so that
histograms come as their exact sums and counts, and without buckets; series per expert stay at home, being thousands.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from ray.util.metrics import Counter, Gauge

logger = logging.getLogger(__name__)

PERIOD_S = 10.0
_LEFT_OUT = ("_bucket", "_created")
_TOO_MANY = "expert"  # label of the families that have a series per expert


class Sample(Protocol):
    """One series of prometheus_client's, now."""

    name: str
    labels: dict[str, str]
    value: float


class Family(Protocol):
    """One metric of prometheus_client's."""

    type: str
    documentation: str

    @property
    def samples(self) -> Sequence[Sample]: ...


class RayMetrics:
    """Ray's copies, by name; each has the labels that it was first seen with."""

    def __init__(self) -> None:
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        self._counted: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def take(self, families: Iterable[Family]) -> None:
        """Copy what they say now."""
        for family in families:
            for sample in family.samples:
                if sample.name.endswith(_LEFT_OUT) or _TOO_MANY in sample.labels:
                    continue
                if family.type == "gauge":
                    self._set(sample, family.documentation)
                else:
                    self._count(sample, family.documentation)

    def _set(self, sample: Sample, text: str) -> None:
        name = sample.name.replace(":", "_")
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, text, tuple(sample.labels))
        self._gauges[name].set(sample.value, dict(sample.labels))

    def _count(self, sample: Sample, text: str) -> None:
        """Ray's counters know increments only."""
        name = sample.name.replace(":", "_").removesuffix("_total")  # which Ray adds
        key = (name, tuple(sorted(sample.labels.items())))
        more = sample.value - self._counted.get(key, 0.0)
        if name not in self._counters:
            self._counters[name] = Counter(name, text, tuple(sample.labels))
        if more > 0:
            self._counters[name].inc(more, dict(sample.labels))
            self._counted[key] = sample.value


async def copy_metrics(collect: Callable[[], Iterable[Family]]) -> None:
    """Copy what `collect` tells, time and again, until cancelled."""
    metrics = RayMetrics()
    while True:
        try:
            await asyncio.to_thread(metrics.take, list(collect()))
        except Exception:  # they are a copy: the server does not depend on them
            logger.exception("the metrics could not be given to Ray")
        await asyncio.sleep(PERIOD_S)

"""What a run of the count-level simulator says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from amoe.sim.flow.deployment import FloatArray
from amoe.types import Int64Array


@dataclass(frozen=True, kw_only=True)
class FlowResult:
    """Figures of the steady state.

    Attributes:
        throughput: tokens per second and device.
        mean_itl, p99_itl: seconds between two tokens of a sequence.
        busy: mean share of the time in which a device computes.
        num_waves: waves in flight.
    """

    throughput: float
    mean_itl: float
    p99_itl: float
    busy: float
    num_waves: int

    @property
    def tail(self) -> float:
        """p99 over mean of the ITL."""
        return self.p99_itl / self.mean_itl


def summarise(
    tokens: Int64Array, finished: FloatArray, busy: FloatArray, num_devices: int, num_warmup: int
) -> FlowResult:
    """Figures from the times [I, A, W] at which each home's wave has finished each iteration; tokens: [A, W]."""
    used = tokens > 0
    spans = finished[-1] - finished[num_warmup]
    num_measured = len(finished) - 1 - num_warmup
    rate = (tokens[used] * num_measured / spans[used]).sum()
    gaps = np.diff(finished[num_warmup:], axis=0)  # [I', A, W]
    weights = np.broadcast_to(tokens, gaps.shape)[gaps > 0].astype(np.float64)
    values = gaps[gaps > 0]
    order = np.argsort(values)
    cumulative = np.cumsum(weights[order])
    p99 = values[order][np.searchsorted(cumulative, 0.99 * cumulative[-1])]
    return FlowResult(
        throughput=float(rate / num_devices),
        mean_itl=float((values * weights).sum() / weights.sum()),
        p99_itl=float(p99),
        busy=float(busy.mean() / finished.max()),
        num_waves=tokens.shape[1],
    )

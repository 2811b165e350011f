"""How many waves should be in flight: a prediction from a cost model, and a prober that needs none.

**Prediction.** Let D be the time that the busiest device works on one wave in one pass through the model, Λ the time
that one wave needs for a pass if it is alone: the sum over the layers of the *slowest* device's attention and experts.
The gap between the two, Λ - D = Σ_l max_d - max_d Σ_l, is what a wave loses by waiting, at every layer, for whoever is
hottest there, although no device is hot everywhere. Then

    T(1) = Λ + communication                        a pass of a single wave: lockstep
    T(W) = max((W - 1)·D + Λ, W·P)    for W > 1     communication is overlapped, but for the time P that the ports need

That is: waves fill each other's gaps, so that every wave but one costs only the busiest device's work. D and Λ
themselves depend on W: smaller waves read the experts' weights again and again, which is why the best W is 1 at low
load, 2 where loads are level, and 3 to 8 where experts compute for long and are skewed. The formula has no constant to
fit. On 28 random points (four models, σ from 0 to 1.25, fresh and stale placements) it picked the best W each time;
later, with stale replicas under full load, it took 3 and 4 where 4 and 6 were 4 % faster. Hence the probe.

**Probing.** A running engine need not believe a model of its hardware: `WaveProber` tries W + 1 and W - 1 now and then,
and keeps what is faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class WaveEstimate:
    """Expected times with `num_waves` waves in flight, for one wave in one pass.

    Attributes:
        busy_s: [N] of each device's blocks.
        port_s: P: for which the busiest port sends.
        latency_s: Λ: of the slowest device's blocks, one after the other.
        communication_s: of all dispatches and combines, one after the other.
    """

    num_waves: int
    busy_s: npt.NDArray[np.float64]
    port_s: float
    latency_s: float
    communication_s: float

    @property
    def pass_s(self) -> float:
        """Predicted time of a pass: T(W)."""
        alone = self.latency_s + self.communication_s
        if self.num_waves == 1:
            return alone
        together = (self.num_waves - 1) * float(self.busy_s.max()) + self.latency_s
        return max(alone, together, self.num_waves * self.port_s)


def choose_num_waves(estimates: Sequence[WaveEstimate]) -> int:
    """The number of waves with the shortest pass; of equals the smallest: all move the same tokens."""
    return min(estimates, key=lambda estimate: (estimate.pass_s, estimate.num_waves)).num_waves


class _Phase(Enum):
    SETTLING = "settling"  # after a change of W: what is measured now is a mixture
    MEASURING = "measuring"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeConfig:
    """How eagerly to try.

    Attributes:
        passes: of every wave that a measurement takes.
        settle_passes: of every wave that are not measured after a change.
        least_gain: relative; less is noise.
        patience: measurements between two attempts; doubles with every attempt in vain, up to `most_patience`.
        load_change: relative change of the tokens in flight that makes measurements incomparable.
        load_factor: so many times more or fewer tokens in flight make what attempts in vain have taught worthless; far
            above the noise of a few sequences, or the attempts would never get rarer.
    """

    passes: int = 6
    settle_passes: int = 2
    least_gain: float = 0.02
    patience: int = 4
    most_patience: int = 64
    load_change: float = 0.15
    load_factor: float = 2.0


class WaveProber:
    """Climbs to the W with the highest throughput, and stays alert.

    It measures W, then a neighbour, then W again, so that a drift of the load speaks for neither; the neighbour has to
    beat both. It knows no clock and no model: `observe` is told what has happened and when.

    Args:
        num_waves: to begin with.
        max_waves: never more.

    Attributes:
        num_waves: that should be in flight now.
    """

    def __init__(self, num_waves: int, max_waves: int, config: ProbeConfig | None = None) -> None:
        self.num_waves = num_waves
        self._best = num_waves
        self._max_waves = max_waves
        self._config = config or ProbeConfig()
        self._patience = self._config.patience
        self._waited = 0
        self._load = 0.0  # tokens per pass at which attempts have been in vain
        self._upwards = True
        self._rates: list[tuple[float, float]] = []  # (tokens per second, tokens per pass) at W, neighbour, W
        self._restart(_Phase.SETTLING, None)

    def observe(self, tokens: int, now: float) -> None:
        """A wave of this home has finished a pass with so many tokens."""
        self._finished += 1
        if self._phase is _Phase.SETTLING:
            if self._finished >= self._config.settle_passes * self.num_waves:
                self._restart(_Phase.MEASURING, now)
            return
        self._tokens += tokens
        if self._finished >= self._config.passes * self.num_waves and self._since is not None and now > self._since:
            in_flight = self._tokens / self._finished * self.num_waves
            rate = self._tokens / (now - self._since)
            self._restart(_Phase.MEASURING, now)
            self._judge(rate, in_flight)

    def _restart(self, phase: _Phase, now: float | None) -> None:
        self._phase, self._since, self._finished, self._tokens = phase, now, 0, 0

    def _switch(self, num_waves: int) -> None:
        if num_waves != self.num_waves:
            self.num_waves = num_waves
            self._restart(_Phase.SETTLING, None)

    def _judge(self, rate: float, in_flight: float) -> None:
        if not self._rates:
            factor = self._config.load_factor
            if in_flight > factor * self._load or in_flight * factor < self._load:
                self._load, self._patience = in_flight, self._config.patience
            self._waited += 1
            neighbour = self._neighbour()
            if self._waited >= self._patience and neighbour is not None:
                self._rates = [(rate, in_flight)]
                self._switch(neighbour)
            return
        self._rates.append((rate, in_flight))
        if len(self._rates) == 2:
            self._tried = self.num_waves
            self._switch(self._best)
            return
        (before, load), (tried, tried_load), (after, later_load) = self._rates
        self._rates, self._waited = [], 0
        limit = self._config.load_change * load
        comparable = abs(tried_load - load) <= limit and abs(later_load - load) <= limit
        if comparable and tried > max(before, after) * (1 + self._config.least_gain):
            self._best = self._tried
            self._patience = self._config.patience
            self._switch(self._best)
        else:
            self._upwards ^= comparable
            self._patience = min(2 * self._patience, self._config.most_patience)

    def _neighbour(self) -> int | None:
        """What to try next; None: there is nothing else."""
        for step in (1, -1) if self._upwards else (-1, 1):
            if 1 <= self._best + step <= self._max_waves:
                return self._best + step
        return None

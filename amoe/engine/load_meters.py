"""What the workers of a cluster have done lately, from the cumulative counters in their heartbeats.

Shape letters: L layers, E experts, D owners (places of expert workers), A homes (attention workers).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from amoe.policy.steering import Measured
from amoe.stats import HistogramSnapshot, WorkerStats

Float64Array = npt.NDArray[np.float64]

MEMORY_S = 10.0  # what was measured so long ago counts 1/e
LOAD_MEMORY_S = 60.0  # the same for the load of experts that decides where they live: moving them takes longer


def _no_pairs() -> Float64Array:
    return np.zeros((1, 1))


@dataclass(slots=True)
class _Counts:
    """Counters of one worker: cumulative ones, or what of them counts still. Pairs are [L, E], or [1, 1] if none."""

    pairs: Float64Array = field(default_factory=_no_pairs)
    work: float = 0.0
    experts_s: float = 0.0
    home_s: float = 0.0
    tokens: float = 0.0
    steps: float = 0.0

    @classmethod
    def of(cls, stats: WorkerStats) -> _Counts:
        """Tokens are summed over the layers' attention blocks, steps as well."""
        attention: list[HistogramSnapshot] = [item for item in stats.batch_sizes if item.kind == "attention"]
        return cls(
            np.asarray(stats.expert_pairs or [[0]], np.float64),
            float(stats.expert_work),
            stats.experts_s,
            stats.home_s,
            sum(item.total for item in attention),
            float(sum(sum(item.counts) for item in attention)),
        )

    def plus(self, other: _Counts, factor: float = 1.0) -> _Counts:
        """Sum with `factor` times another."""
        return _Counts(
            self.pairs + factor * other.pairs,
            self.work + factor * other.work,
            self.experts_s + factor * other.experts_s,
            self.home_s + factor * other.home_s,
            self.tokens + factor * other.tokens,
            self.steps + factor * other.steps,
        )


@dataclass(slots=True)
class _Meter:
    """What one worker has done lately: an exponentially weighted sum over time."""

    total: _Counts = field(default_factory=_Counts)
    recent: _Counts = field(default_factory=_Counts)
    seen_at: float = -math.inf

    def observe(self, total: _Counts, now: float) -> _Counts | None:
        """Take cumulative counters. Returns what is new; None if nothing is: idle time makes nobody forget."""
        news = total.plus(self.total, -1.0)
        if news.steps < 0 or news.work < 0:
            news = total  # another process has taken its place
        has_worked = news.home_s + news.experts_s > 0
        if has_worked:
            self.recent = news.plus(self.recent, math.exp(-(now - self.seen_at) / MEMORY_S))
        self.total, self.seen_at = total, now
        return news if has_worked else None


class LoadMeters:
    """Of all workers of one cluster.

    Args:
        homes: ranks of the attention workers.
        owner_ranks: ranks of the workers that may ever hold experts.
    """

    def __init__(self, homes: Sequence[int], owner_ranks: Sequence[int]) -> None:
        self._homes, self._owner_ranks = tuple(homes), tuple(owner_ranks)
        self._meters = {rank: _Meter() for rank in {*homes, *owner_ranks}}
        self._departed = _no_pairs()  # what workers that are gone have computed, as the meters would count it
        self._load = _no_pairs()
        self._seen_at = -math.inf

    def observe(self, stats: WorkerStats, now: float) -> None:
        """A heartbeat has come."""
        news = self._meters[stats.rank].observe(_Counts.of(stats), now)
        if news is not None:
            passed_s = now - self._seen_at
            self._departed = self._departed * math.exp(-passed_s / MEMORY_S)
            self._load = self._load * math.exp(-passed_s / LOAD_MEMORY_S) + news.pairs
        self._seen_at = now

    def forget(self, rank: int) -> None:
        """The worker is gone. How fast it was says nothing of who comes next; which experts were hot still does."""
        self._departed = self._departed + self._meters[rank].recent.pairs
        self._meters[rank] = _Meter()

    def load(self) -> Float64Array | None:
        """[L, E] pairs that all together have computed over the last minute or so; None: none at all."""
        return self._load.copy() if self._load.any() else None

    def measured(self) -> Measured | None:
        """What there is to steer by; None: nothing has been computed yet."""
        owners = [self._meters[rank].recent for rank in self._owner_ranks]
        homes = [self._meters[rank].recent for rank in self._homes]
        pairs = sum((counts.pairs for counts in owners), self._departed)
        if not pairs.any() or not any(counts.tokens for counts in homes):
            return None
        num_layers = len(pairs)
        is_owner = [float(rank in self._owner_ranks) for rank in self._homes]
        return Measured(
            pairs=pairs,
            work=np.array([counts.work for counts in owners]),
            expert_s=np.array([counts.experts_s for counts in owners]),
            tokens=np.array([counts.tokens for counts in homes]) / num_layers,
            home_s=np.array([counts.home_s for counts in homes]),
            elsewhere_s=np.array([counts.experts_s for counts in homes]) * is_owner,
            tokens_per_batch=sum(counts.tokens / counts.steps for counts in homes if counts.steps),
        )

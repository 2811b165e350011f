"""What a simulation shows: meters that fill up while it runs, and the figures that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from amoe.core.steps import BlockStep
from amoe.types import BlockKind

Float64Array = npt.NDArray[np.float64]

NUM_BINS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Distribution of `count` observations in seconds; NaN if there is none."""

    count: int
    mean: float
    p50: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Float64Array) -> Spread:
        """Summarise [n] seconds."""
        if len(values) == 0:
            return cls(count=0, mean=np.nan, p50=np.nan, p99=np.nan, max=np.nan)
        p50, p99 = (float(p) for p in np.percentile(values, (50, 99)))
        return cls(count=len(values), mean=float(values.mean()), p50=p50, p99=p99, max=float(values.max()))


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockFigures:
    """Steps of one kind of block at one worker that had tokens, and how many tokens on average."""

    steps: int
    mean_batch: float


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerFigures:
    """One worker, in the window.

    Attributes:
        role: "attention", "experts" or "colocated".
        busy_fraction: share of the time in which a kernel ran.
        host_fraction: share in which the device waited for the host.
        blocks: by kind: attention, experts, head; those that it holds.
        num_preemptions: since the start.
    """

    rank: int
    role: str
    busy_fraction: float
    host_fraction: float
    blocks: dict[str, BlockFigures]
    num_preemptions: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Bin:
    """Output tokens per second around a moment of the simulation."""

    start_s: float
    tokens_per_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """One simulation. Everything but `timeline` is of the window after the warm-up.

    Attributes:
        window_s: simulated seconds that were measured.
        output_tokens, tokens_per_s, tokens_per_s_per_device: sampled.
        requests_finished: that ended in the window.
        requests_open: that had not ended when the simulation did.
        inter_token_latency, time_to_first_token: seconds; TTFT counts from the arrival of the request.
        network_bytes: sent between devices, since the start.
        timeline: throughput from the start to the end, in bins.
        num_events, num_steps: of the simulation, the warm-up included.
    """

    window_s: float
    output_tokens: int
    tokens_per_s: float
    tokens_per_s_per_device: float
    requests_finished: int
    requests_open: int
    inter_token_latency: Spread
    time_to_first_token: Spread
    network_bytes: float
    workers: tuple[WorkerFigures, ...]
    timeline: tuple[Bin, ...] = field(default=())
    num_events: int = 0
    num_steps: int = 0


class WorkerMeter:
    """Counts the steps of one worker; `open` begins the window."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.busy_s = 0.0
        self.host_s = 0.0
        self._is_open = False
        self._begin: float | None = None
        self._seconds = 0.0
        self._opened_at = 0.0
        self._steps = [0] * len(BlockKind)
        self._tokens = [0] * len(BlockKind)

    def begin(self, step: BlockStep, begin: float, seconds: float, host_s: float) -> None:
        """A step of `seconds` (without outages) begins at `begin`; the host has kept it waiting for `host_s`."""
        self.num_steps += 1
        self._begin, self._seconds = begin, seconds
        if self._is_open:
            self.host_s += host_s
            if step.num_tokens:
                kind = step.block.kind
                self._steps[kind] += 1
                self._tokens[kind] += step.num_tokens

    def end(self, now: float) -> None:
        """The step has ended, or the simulation has."""
        if self._is_open and self._begin is not None:
            self.busy_s += min(self._seconds, max(0.0, now - max(self._begin, self._opened_at)))
        self._begin = None

    def open(self, now: float) -> None:
        """Count from now on."""
        self._is_open = True
        self._opened_at = now

    def blocks(self) -> dict[str, BlockFigures]:
        """By kind; those that ran."""
        return {
            kind.name.lower(): BlockFigures(steps=self._steps[kind], mean_batch=self._tokens[kind] / self._steps[kind])
            for kind in BlockKind
            if self._steps[kind]
        }


class TokenMeter:
    """Sees requests come and tokens leave; `open` begins the window."""

    def __init__(self) -> None:
        self.num_requests = 0
        self.num_finished = 0
        self.num_tokens = 0
        self.window_tokens = 0
        self.window_finished = 0
        self._is_open = False
        self._arrived: Float64Array = np.zeros(1024)
        self._last: Float64Array = np.zeros(1024)  # when the last token left; NaN before the first
        self._gaps: list[Float64Array] = []
        self._first: list[Float64Array] = []
        self._times: list[float] = []
        self._counts: list[int] = []

    def arrive(self, request_id: int, now: float) -> None:
        """A request comes; their numbers count up from 0."""
        if request_id >= len(self._last):
            self._arrived = np.concatenate((self._arrived, np.zeros(len(self._arrived))))
            self._last = np.concatenate((self._last, np.zeros(len(self._last))))
        self.num_requests += 1
        self._arrived[request_id] = now
        self._last[request_id] = np.nan

    def leave(self, request_ids: npt.NDArray[np.int64], num_finished: int, now: float) -> None:
        """One token of each request [n] leaves; `num_finished` of them end."""
        last = self._last[request_ids]
        self._last[request_ids] = now
        self.num_tokens += len(request_ids)
        self.num_finished += num_finished
        self._times.append(now)
        self._counts.append(len(request_ids))
        if not self._is_open:
            return
        self.window_tokens += len(request_ids)
        self.window_finished += num_finished
        is_first = np.isnan(last)
        if is_first.any():
            self._first.append(now - self._arrived[request_ids[is_first]])
            last = last[~is_first]
        self._gaps.append(now - last)

    def open(self) -> None:
        """Count from now on."""
        self._is_open = True

    @property
    def inter_token_latency(self) -> Spread:
        return Spread.of(np.concatenate(self._gaps) if self._gaps else np.empty(0))

    @property
    def time_to_first_token(self) -> Spread:
        return Spread.of(np.concatenate(self._first) if self._first else np.empty(0))

    def timeline(self, end: float) -> tuple[Bin, ...]:
        """Throughput from 0 to `end`."""
        if end <= 0:
            return ()
        counts, edges = np.histogram(self._times, bins=NUM_BINS, range=(0.0, end), weights=self._counts)
        width = end / NUM_BINS
        return tuple(
            Bin(start_s=float(start), tokens_per_s=float(count / width))
            for start, count in zip(edges[:-1], counts, strict=True)
        )


def role_of(rank: int, attention_ranks: Sequence[int], expert_ranks: Sequence[int]) -> str:
    """ "attention", "experts", or "colocated" for both."""
    is_home, is_owner = rank in attention_ranks, rank in expert_ranks
    return "colocated" if is_home and is_owner else "attention" if is_home else "experts"

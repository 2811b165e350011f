"""What workers count about themselves: snapshots that travel to the server, where `amoe.metrics` names them.

Counters and histograms are cumulative since the worker started, so that a lost snapshot loses nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

BATCH_SIZE_EDGES: tuple[float, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
ITERATION_EDGES: tuple[float, ...] = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
JOIN_WAIT_EDGES: tuple[float, ...] = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 1.0)
# Fine enough for percentiles that are shown: 16 to a decade (15 % wide), 0.1 ms to 1000 s.
LATENCY_EDGES: tuple[float, ...] = tuple(1e-4 * 10 ** (index / 16) for index in range(7 * 16 + 1))


@dataclass(slots=True)
class HistogramSnapshot:
    """One series of a histogram.

    Attributes:
        kind: name of a block kind, lower case.
        layer: layer index.
        counts: [len(edges) + 1] observations per bucket (not cumulated), the last one above all edges.
        total: sum of the observed values.
    """

    kind: str
    layer: int
    counts: list[int]
    total: float


class LayerHistograms:
    """One histogram per layer over common edges; observing costs two array operations, however many values."""

    def __init__(self, num_layers: int, edges: tuple[float, ...]) -> None:
        self._edges = np.asarray(edges, np.float64)
        self._counts = np.zeros((num_layers, len(edges) + 1), np.int64)
        self._totals = np.zeros(num_layers, np.float64)

    def observe(self, layer: int, value: float) -> None:
        """Count one value."""
        self._counts[layer, self._edges.searchsorted(value)] += 1
        self._totals[layer] += value

    def observe_many(self, layer: int, values: npt.NDArray[np.float64]) -> None:
        """Count values [n]."""
        buckets = self._edges.searchsorted(values)
        self._counts[layer] += np.bincount(buckets, minlength=self._counts.shape[1])
        self._totals[layer] += values.sum()

    def observe_each(self, layers: npt.NDArray[np.int64], values: npt.NDArray[np.int64]) -> None:
        """Count `values` [m], one in each of the `layers` [m], no layer twice."""
        self._counts[layers, self._edges.searchsorted(values)] += 1
        self._totals[layers] += values

    def snapshot(self, kind: str) -> list[HistogramSnapshot]:
        """The layers that have seen a value."""
        seen = np.flatnonzero(self._counts.any(axis=1))
        return [
            HistogramSnapshot(kind, int(layer), self._counts[layer].tolist(), float(self._totals[layer]))
            for layer in seen
        ]


@dataclass(slots=True)
class QueueSnapshot:
    """One μ-queue: `depth` tokens, the oldest of which has waited `age_s` seconds.

    Queues fill and drain many times between two snapshots, so what one moment shows is chance. The change of `waited_s`
    over some time, divided by that time, is the mean depth.

    Attributes:
        waited_s: seconds that tokens have waited here, cumulative and summed over the tokens.
        ran_s: seconds that tokens have been in the block itself, likewise.
    """

    kind: str
    layer: int
    depth: int
    age_s: float
    waited_s: float = 0.0
    ran_s: float = 0.0


@dataclass(slots=True)
class CapacitySnapshot:
    """What capacity has taken at one home, cumulative.

    Attributes:
        reason: `factor` (over the cap of a batch) or `slack` (the expert's worker is late).
        lost: [m] of [layer, expert, pairs dropped, pairs rerouted to other experts], where not both are 0.
        num_over: pairs computed beyond the cap: of exact requests, or a token's best.
        gate_mass_lost: sum over tokens and layers of the lost part of the router's weight; tokens: of how many.
    """

    reason: str
    lost: list[list[int]]
    num_over: int
    gate_mass_lost: float
    tokens: int


@dataclass(slots=True)
class DecisionSnapshot:
    """How often a worker's scheduler has decided so, cumulative.

    Attributes:
        block: kind of the block that ran, lower case; "none" where it ran none.
        reason: see `amoe.policy.decision`.
    """

    block: str
    reason: str
    count: int


@dataclass(slots=True)
class TrafficSnapshot:
    """What a worker has sent, cumulative.

    Attributes:
        kind: of the batches: "dispatch", "result" or "announce".
        path: "local" (to this very worker) or "remote".
        messages: batches, markers included; tokens: rows in them.
        payload_bytes: of hidden states; a dispatch to this very worker leaves them where they are.
    """

    kind: str
    path: str
    messages: int
    tokens: int
    payload_bytes: int


@dataclass(slots=True)
class WorkerStats:
    """Snapshot of one worker.

    Attributes:
        rank, role: `role` is "attention", "experts" or "colocated" (both).
        at_s: the worker's own clock: the time between two snapshots is their difference.
        loops: turns of the worker's loop: they prove that it makes progress.
        busy_s: seconds in which a block ran, cumulative.
        home_s: of these, in attention blocks and heads; experts_s: in experts.
        expert_work: units of work that the experts did, see `amoe.policy.steering`, cumulative.
        modelled_s: seconds that an emulated device's kernels were to take, cumulative; 0 at a real one.
        steps: steps run, cumulative: single blocks, or all of them as one.
        num_running, num_waiting: sequences (attention workers).
        kv_blocks_used, kv_blocks_total: blocks of the KV cache; cached but unreferenced blocks are not used.
        token_slots_used: tokens in flight (attention workers).
        num_preemptions: cumulative.
        num_waves: into which sequences are split now; 0 in schedules without waves.
        num_slips: times that a wave went on without somebody who kept it waiting for too long, cumulative.
        prefix_queries, prefix_hits: prompt tokens looked up in and found in the prefix cache, cumulative.
        queues: the μ-queues of the worker.
        batch_sizes: tokens per step, by kind and layer.
        join_waits: seconds between a token's dispatch and its last answer, by layer.
        expert_pairs: [num_layers][num_experts] (token, expert) pairs computed, cumulative (expert workers).
        capacity: None where it is off (attention workers).
        num_deferred: of the waiting sequences, those that wait for another sequence, not for room.
        busy_by_block: `busy_s` by kind of block.
        wait_s: seconds in which the loop slept, by reason, see `amoe.policy.decision`: "idle", "away", "held".
        iteration_tokens: tokens that entered the model at one time (attention workers that have run).
        decisions: of the scheduler; traffic: what was sent.
        redone_tokens: (token, layer) dispatches begun again because a worker that owed answers was lost, cumulative.
        resent_tokens: likewise, sent again because an answer did not come, cumulative (attention workers).
        parked_tokens: tokens that wait, now, for an expert that nobody holds (attention workers).
        expert_wait_s: seconds that tokens have waited for others at the experts, summed over the tokens, cumulative
            (expert workers): from their arrival until their step, while the worker ran another, and in their step,
            whose time is shared evenly among its tokens, for the shares of the others.
    """

    rank: int
    role: str
    loops: int = 0
    busy_s: float = 0.0
    steps: int = 0
    num_running: int = 0
    num_waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    token_slots_used: int = 0
    num_preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    queues: list[QueueSnapshot] = field(default_factory=list)
    batch_sizes: list[HistogramSnapshot] = field(default_factory=list)
    join_waits: list[HistogramSnapshot] = field(default_factory=list)
    expert_pairs: list[list[int]] = field(default_factory=list)
    modelled_s: float = 0.0
    num_waves: int = 0
    num_slips: int = 0
    home_s: float = 0.0
    experts_s: float = 0.0
    expert_work: int = 0
    capacity: CapacitySnapshot | None = None
    at_s: float = 0.0
    num_deferred: int = 0
    busy_by_block: dict[str, float] = field(default_factory=dict)
    wait_s: dict[str, float] = field(default_factory=dict)
    iteration_tokens: HistogramSnapshot | None = None
    decisions: list[DecisionSnapshot] = field(default_factory=list)
    traffic: list[TrafficSnapshot] = field(default_factory=list)
    redone_tokens: int = 0
    resent_tokens: int = 0
    parked_tokens: int = 0
    expert_wait_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterStats:
    """Who there is, now, as the one who supervises the workers knows it.

    Attributes:
        version: of the topology.
        states: role ("attention", "experts" or "colocated") and state of each worker, by rank.
        num_wanted, num_most: workers with experts that there ought to be, and may be.
        num_replicas: (layer, expert) copies beyond one each.
        num_missing: (layer, expert) pairs that nobody holds.
    """

    version: int
    states: dict[int, tuple[str, str]]
    num_wanted: int = 0
    num_most: int = 0
    num_replicas: int = 0
    num_missing: int = 0

    @property
    def num_serving(self) -> int:
        """Workers with experts that serve."""
        return sum(role != "attention" and state == "serving" for role, state in self.states.values())


@dataclass(slots=True)
class SteeringStats:
    """What the server knows of its workers' speeds, and what it has made of it.

    Attributes:
        owner_speed: of each expert worker, by rank, relative to the median one.
        home_share: of the new sequences, for each attention worker, by rank.
        moved: part of the pairs that goes to another replica than the primary.
        num_plans: times that the homes were told other shares of replicas, cumulative.
    """

    owner_speed: dict[int, float]
    home_share: dict[int, float]
    moved: float = 0.0
    num_plans: int = 0


@dataclass(frozen=True, slots=True)
class FlowSample:
    """What had gone through the server at one moment; all counts are cumulative.

    Attributes:
        at_s: the server's clock.
        prompt_tokens: of the requests that had got their first token; generated_tokens: of all requests.
        ttft, itl: [len(LATENCY_EDGES) + 1] times to the first token and between tokens, per bucket.
    """

    at_s: float
    prompt_tokens: int
    generated_tokens: int
    ttft: npt.NDArray[np.int64]
    itl: npt.NDArray[np.int64]


class RequestFlow:
    """Counts what goes through the server, and remembers the last minutes, for people who watch.

    The histograms in `amoe.metrics` have the buckets of vLLM's, the first of which ends at 10 ms.

    Attributes:
        samples: the last ones, oldest first, about one per second.
    """

    MEMORY = 300

    def __init__(self) -> None:
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._ttft = [0] * (len(LATENCY_EDGES) + 1)
        self._itl = [0] * (len(LATENCY_EDGES) + 1)
        self.samples: deque[FlowSample] = deque(maxlen=self.MEMORY)

    def first_token(self, seconds: float, num_prompt_tokens: int) -> None:
        """A request's first token came after `seconds`."""
        self._prompt_tokens += num_prompt_tokens
        self._ttft[bisect_left(LATENCY_EDGES, seconds)] += 1

    def tokens(self, count: int, seconds_since_last: float | None) -> None:
        """A request got `count` tokens; None with its first ones."""
        self._generated_tokens += count
        if seconds_since_last is not None:
            self._itl[bisect_left(LATENCY_EDGES, seconds_since_last)] += 1

    def now(self, at_s: float) -> FlowSample:
        """What has gone through so far."""
        return FlowSample(
            at_s,
            self._prompt_tokens,
            self._generated_tokens,
            np.array(self._ttft, np.int64),
            np.array(self._itl, np.int64),
        )

    def mark(self, at_s: float) -> None:
        """Remember this moment, unless the last one is not a second old. To be called about twice a second."""
        if not self.samples or at_s - self.samples[-1].at_s >= 0.9:
            self.samples.append(self.now(at_s))


def latency_quantile(counts: npt.NDArray[np.int64], q: float) -> float | None:
    """The `q` quantile (0 to 1) in seconds of counts [len(LATENCY_EDGES) + 1]; None if there is no value."""
    total = int(counts.sum())
    if not total:
        return None
    cumulated = counts.cumsum()
    place = max(1.0, q * total)
    bucket = int(cumulated.searchsorted(place))
    low = LATENCY_EDGES[max(0, bucket - 1)]
    high = LATENCY_EDGES[min(bucket, len(LATENCY_EDGES) - 1)]
    before = int(cumulated[bucket - 1]) if bucket else 0
    inside = (place - before) / max(1, int(counts[bucket]))
    return float(low * (high / low) ** inside)

"""The only place that names a metric.

Request-level series are vLLM's under another prefix: same suffixes, labels and buckets, so that replacing `vllm:` by
`amoe:` ports a dashboard. Worker series come from the snapshots that workers send with each heartbeat.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from amoe.stats import BATCH_SIZE_EDGES, JOIN_WAIT_EDGES, HistogramSnapshot, RequestFlow, SteeringStats, WorkerStats
from amoe.types import FinishReason

CONTENT_TYPE = CONTENT_TYPE_LATEST

# fmt: off
TTFT_BUCKETS = (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
TOKEN_BUCKETS = (.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST_BUCKETS = (.3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
# fmt: on
LABELS = ("model_name", "engine")

disable_created_metrics()  # a `_created` twin of every series, which nobody plots


def one_two_five_buckets(limit: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to `limit`."""
    series = (mantissa * 10**exponent for exponent in itertools.count() for mantissa in (1, 2, 5))
    return list(itertools.takewhile(lambda value: value <= limit, series))


class EngineMetrics:
    """All series of one engine, in a registry of its own.

    The `engine` label is the rank of the attention worker that served the request.

    Attributes:
        workers: the latest snapshot of each worker, by rank.
        flow: tokens and latencies of the last minutes.
    """

    def __init__(self, model_name: str, max_model_len: int) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self.workers: dict[int, WorkerStats] = {}
        self.flow = RequestFlow()
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens processed.")
        self._prompt_tokens_cached = self._counter("prompt_tokens_cached", "Prompt tokens found in the prefix cache.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._request_success = Counter(
            "amoe:request_success", "Requests ended.", (*LABELS, "finished_reason"), registry=self.registry
        )
        self._rejections = Counter(
            "amoe:admission_rejections", "Requests refused.", ("model_name", "reason"), registry=self.registry
        )
        self._ttft = self._histogram("time_to_first_token_seconds", "Seconds to the first token.", TTFT_BUCKETS)
        self._itl = self._histogram("inter_token_latency_seconds", "Seconds between tokens.", TOKEN_BUCKETS)
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds",
            "A request's mean seconds per later token.",
            TOKEN_BUCKETS,
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "Seconds of a whole request.", REQUEST_BUCKETS)
        self._decode_time = self._histogram(
            "request_decode_time_seconds", "Seconds from the first to the last token.", REQUEST_BUCKETS
        )
        sizes = one_two_five_buckets(max_model_len)
        self._request_prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", sizes)
        self._request_generation = self._histogram("request_generation_tokens", "Generated tokens of a request.", sizes)
        self._healthy = Gauge(
            "amoe:engine_healthy", "1 while every worker makes progress.", ("model_name",), registry=self.registry
        )
        self._healthy.labels(model_name).set(1)
        self.registry.register(_WorkerCollector(model_name, self.workers))
        self._steering = _SteeringCollector(model_name)
        self.registry.register(self._steering)

    def _counter(self, name: str, documentation: str) -> Counter:
        return Counter(f"amoe:{name}", documentation, LABELS, registry=self.registry)

    def _histogram(self, name: str, documentation: str, buckets: Iterable[float]) -> Histogram:
        return Histogram(f"amoe:{name}", documentation, LABELS, buckets=tuple(buckets), registry=self.registry)

    def prepare(self, ranks: Iterable[int]) -> None:
        """Create the request-level series of these attention workers, so that a graph starts at 0."""
        for rank in ranks:
            labels = (self._model_name, str(rank))
            for counter in (self._prompt_tokens, self._prompt_tokens_cached, self._generation_tokens):
                counter.labels(*labels)
            for histogram in (self._ttft, self._itl, self._tpot, self._e2e, self._decode_time):
                histogram.labels(*labels)
            for reason in ("stop", "length", "abort", "error"):
                self._request_success.labels(*labels, reason)

    def first_token(self, rank: int, seconds: float, num_prompt_tokens: int, num_cached_tokens: int) -> None:
        """A request's first token came `seconds` after its arrival: its prompt has been processed."""
        labels = (self._model_name, str(rank))
        self._ttft.labels(*labels).observe(seconds)
        self.flow.first_token(seconds, num_prompt_tokens)
        self._prompt_tokens.labels(*labels).inc(num_prompt_tokens)
        self._prompt_tokens_cached.labels(*labels).inc(num_cached_tokens)

    def tokens(self, rank: int, count: int, seconds_since_last: float | None) -> None:
        """A step brought `count` tokens of one request; None with its first ones."""
        labels = (self._model_name, str(rank))
        self._generation_tokens.labels(*labels).inc(count)
        self.flow.tokens(count, seconds_since_last)
        if seconds_since_last is not None:
            self._itl.labels(*labels).observe(seconds_since_last)

    def finished(
        self,
        rank: int,
        reason: FinishReason,
        *,
        seconds: float,
        decode_seconds: float | None,
        num_prompt_tokens: int,
        num_generated_tokens: int,
    ) -> None:
        """A request ended; `decode_seconds` is None if it got no token."""
        labels = (self._model_name, str(rank))
        self._request_success.labels(*labels, reason).inc()
        self._e2e.labels(*labels).observe(seconds)
        self._request_prompt.labels(*labels).observe(num_prompt_tokens)
        self._request_generation.labels(*labels).observe(num_generated_tokens)
        if decode_seconds is not None:
            self._decode_time.labels(*labels).observe(decode_seconds)
            if num_generated_tokens > 1:
                self._tpot.labels(*labels).observe(decode_seconds / (num_generated_tokens - 1))

    def rejected(self, reason: str) -> None:
        """A request was refused for want of room, or because the server is going or its engine is dead."""
        self._rejections.labels(self._model_name, reason).inc()

    def worker(self, stats: WorkerStats) -> None:
        """Take a worker's latest snapshot."""
        self.workers[stats.rank] = stats

    def steered(self, state: SteeringStats) -> None:
        """Take what has been made of the snapshots."""
        self._steering.state = state

    def healthy(self, value: bool) -> None:
        """Whether every worker makes progress."""
        self._healthy.labels(self._model_name).set(value)

    def render(self) -> bytes:
        """The text exposition, of content type `CONTENT_TYPE`."""
        return generate_latest(self.registry)


def _cumulative(snapshot: HistogramSnapshot, edges: tuple[float, ...]) -> list[tuple[str, float]]:
    bounds = [*map(str, map(float, edges)), "+Inf"]
    return list(zip(bounds, itertools.accumulate(map(float, snapshot.counts)), strict=True))


class _WorkerCollector(Collector):
    """Names what the workers count, at the moment of the scrape."""

    def __init__(self, model_name: str, workers: dict[int, WorkerStats]) -> None:
        self._model_name = model_name
        self._workers = workers

    def collect(self) -> Iterator[Metric]:
        """One family after the other, over the latest snapshot of each worker."""
        stats = [self._workers[rank] for rank in sorted(self._workers)]
        yield from self._attention_families([s for s in stats if s.role != "experts"])
        yield from self._queue_families(stats)
        yield from self._histogram_families(stats)
        yield from self._work_families(stats)
        yield from self._capacity_families(stats)

    def _attention_families(self, stats: list[WorkerStats]) -> Iterator[Metric]:
        gauges = (
            ("num_requests_running", "Sequences being computed.", [s.num_running for s in stats]),
            ("num_requests_waiting", "Sequences waiting to be computed.", [s.num_waiting for s in stats]),
            (
                "kv_cache_usage_perc",
                "KV cache blocks in use; 1 is all.",
                [s.kv_blocks_used / max(1, s.kv_blocks_total) for s in stats],
            ),
            ("token_slots_used", "Tokens in flight.", [s.token_slots_used for s in stats]),
        )
        counters = (
            ("num_preemptions", "Sequences that lost their KV cache to others.", [s.num_preemptions for s in stats]),
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", [s.prefix_queries for s in stats]),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", [s.prefix_hits for s in stats]),
        )
        for families, kind in ((gauges, GaugeMetricFamily), (counters, CounterMetricFamily)):
            for name, documentation, values in families:
                family = kind(f"amoe:{name}", documentation, labels=LABELS)
                for worker, value in zip(stats, values, strict=True):
                    family.add_metric((self._model_name, str(worker.rank)), value)
                yield family

    def _queue_families(self, stats: list[WorkerStats]) -> Iterator[Metric]:
        labels = ("worker", "block", "layer")
        depth = GaugeMetricFamily("amoe:micro_queue_depth", "Tokens waiting for a block.", labels=labels)
        age = GaugeMetricFamily("amoe:micro_queue_age_seconds", "How long the oldest of them waits.", labels=labels)
        for worker in stats:
            for queue in worker.queues:
                values = (str(worker.rank), queue.kind, str(queue.layer))
                depth.add_metric(values, queue.depth)
                age.add_metric(values, queue.age_s)
        yield depth
        yield age

    def _histogram_families(self, stats: list[WorkerStats]) -> Iterator[Metric]:
        labels = ("worker", "block", "layer")
        sizes = HistogramMetricFamily("amoe:block_batch_size", "Tokens per run of a block.", labels=labels)
        waits = HistogramMetricFamily(
            "amoe:join_wait_seconds", "From a token's dispatch to its last answer.", labels=labels
        )
        for worker in stats:
            for family, snapshots, edges in (
                (sizes, worker.batch_sizes, BATCH_SIZE_EDGES),
                (waits, worker.join_waits, JOIN_WAIT_EDGES),
            ):
                for snapshot in snapshots:
                    values = (str(worker.rank), snapshot.kind, str(snapshot.layer))
                    family.add_metric(values, _cumulative(snapshot, edges), sum_value=snapshot.total)
        yield sizes
        yield waits

    def _work_families(self, stats: list[WorkerStats]) -> Iterator[Metric]:
        busy = CounterMetricFamily("amoe:worker_busy_seconds", "Seconds in which a block ran.", labels=("worker",))
        steps = CounterMetricFamily("amoe:worker_steps", "Blocks run.", labels=("worker",))
        pairs = CounterMetricFamily(
            "amoe:expert_pairs", "(token, expert) pairs computed.", labels=("layer", "expert", "worker")
        )
        waves = GaugeMetricFamily("amoe:waves", "Waves into which sequences are split.", labels=("worker",))
        slips = CounterMetricFamily(
            "amoe:wave_slips",
            "Waves that went on without somebody for whom they had waited too long.",
            labels=("worker",),
        )
        for worker in stats:
            rank = str(worker.rank)
            if worker.num_waves:
                waves.add_metric((rank,), worker.num_waves)
                slips.add_metric((rank,), worker.num_slips)
            busy.add_metric((rank,), worker.busy_s)
            steps.add_metric((rank,), worker.steps)
            for layer, row in enumerate(worker.expert_pairs):
                for expert, count in enumerate(row):
                    if count:  # a worker holds some experts only, and cold ones need no series
                        pairs.add_metric((str(layer), str(expert), rank), count)
        yield busy
        yield steps
        yield pairs
        yield waves
        yield slips

    def _capacity_families(self, stats: list[WorkerStats]) -> Iterator[Metric]:
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
        for worker in stats:
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


class _SteeringCollector(Collector):
    """Names what steering knows and does."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self.state = SteeringStats({}, {})

    def collect(self) -> Iterator[Metric]:
        """Nothing of a worker before the first plan."""
        state, labels = self.state, ("model_name",)
        for name, documentation, values in (
            ("owner_speed", "Speed of an expert worker; 1 is the median one's.", state.owner_speed),
            ("home_share", "Part of the new sequences that an attention worker gets.", state.home_share),
        ):
            family = GaugeMetricFamily(f"amoe:{name}", documentation, labels=("worker",))
            for rank, value in sorted(values.items()):
                family.add_metric((str(rank),), value)
            yield family
        moved = GaugeMetricFamily(
            "amoe:replica_pairs_moved_perc",
            "Pairs that go to another replica than the primary; 1 is all.",
            labels=labels,
        )
        moved.add_metric((self._model_name,), state.moved)
        yield moved
        plans = CounterMetricFamily("amoe:replica_plans", "Times that shares of replicas changed.", labels=labels)
        plans.add_metric((self._model_name,), state.num_plans)
        yield plans

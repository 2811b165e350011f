"""Series of workers, named at the moment of the scrape from the snapshots that came with their heartbeats."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from amoe.config import CacheConfig
from amoe.metrics.buckets import LABELS, cumulative
from amoe.metrics.cluster import redo_families
from amoe.metrics.experts import ExpertLoad, capacity_families, load_families
from amoe.stats import BATCH_SIZE_EDGES, ITERATION_EDGES, JOIN_WAIT_EDGES, WorkerStats

_BLOCK_LABELS = ("worker", "block", "layer")
_TRAFFIC_LABELS = ("worker", "kind", "path")

Values = Callable[[WorkerStats], float]
_SEQUENCE_GAUGES: tuple[tuple[str, str, Values], ...] = (
    ("num_requests_running", "Sequences being computed.", lambda s: s.num_running),
    ("num_requests_waiting", "Sequences waiting to be computed.", lambda s: s.num_waiting),
    (
        "kv_cache_usage_perc",
        "KV cache blocks in use; 1 is all.",
        lambda s: s.kv_blocks_used / max(1, s.kv_blocks_total),
    ),
    ("token_slots_used", "Tokens in flight.", lambda s: s.token_slots_used),
)
_SEQUENCE_COUNTERS: tuple[tuple[str, str, Values], ...] = (
    ("num_preemptions", "Sequences that lost their KV cache to others.", lambda s: s.num_preemptions),
    ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", lambda s: s.prefix_queries),
    ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", lambda s: s.prefix_hits),
)


class WorkerCollector(Collector):
    """Names what the workers count.

    Args:
        workers: the latest snapshot of each, by rank; filled by others.
        heartbeats: Unix time of its last sign of life, by rank; none of a worker that is lost.
        cache: configuration of their KV caches.
    """

    def __init__(
        self,
        model_name: str,
        workers: dict[int, WorkerStats],
        heartbeats: dict[int, float],
        load: ExpertLoad,
        cache: CacheConfig,
    ) -> None:
        self._model_name = model_name
        self._workers = workers
        self._heartbeats = heartbeats
        self._load = load
        self._cache = cache

    def collect(self) -> Iterator[Metric]:
        """One family after the other, over the latest snapshot of each worker."""
        workers = dict(self._workers)  # the scrape runs in a thread, and workers come and go
        stats = [workers[rank] for rank in sorted(workers)]
        homes = [s for s in stats if s.role != "experts"]
        yield from self._sequence_families(homes)
        yield from self._cache_families(homes)
        yield from self._life_families(stats)
        yield from _queue_families(stats)
        yield from _histogram_families(stats)
        yield from _work_families(stats)
        yield from _wave_families(stats)
        yield from _traffic_families(stats)
        yield from redo_families(homes)
        yield from load_families(stats, self._load)
        yield from capacity_families(stats)

    def _sequence_families(self, homes: list[WorkerStats]) -> Iterator[Metric]:
        for families, kind in ((_SEQUENCE_GAUGES, GaugeMetricFamily), (_SEQUENCE_COUNTERS, CounterMetricFamily)):
            for name, documentation, value in families:
                family = kind(f"amoe:{name}", documentation, labels=LABELS)
                for worker in homes:
                    family.add_metric((self._model_name, str(worker.rank)), value(worker))
                yield family
        reasons = GaugeMetricFamily(
            "amoe:num_requests_waiting_by_reason",
            "Sequences waiting for room (capacity), or for another sequence (deferred).",
            labels=(*LABELS, "reason"),
        )
        iterations = HistogramMetricFamily(
            "amoe:iteration_tokens_total", "Tokens that entered the model at one time.", labels=LABELS
        )
        for worker in homes:
            labels = (self._model_name, str(worker.rank))
            reasons.add_metric((*labels, "capacity"), worker.num_waiting - worker.num_deferred)
            reasons.add_metric((*labels, "deferred"), worker.num_deferred)
            snapshot = worker.iteration_tokens
            if snapshot is not None:
                iterations.add_metric(labels, cumulative(snapshot, ITERATION_EDGES), sum_value=snapshot.total)
        yield reasons
        yield iterations

    def _cache_families(self, homes: list[WorkerStats]) -> Iterator[Metric]:
        info = GaugeMetricFamily(
            "amoe:cache_config_info",
            "The KV cache of an attention worker, told by labels; always 1.",
            labels=(*LABELS, "block_size", "num_gpu_blocks", "enable_prefix_caching"),
        )
        for worker in homes:
            if worker.kv_blocks_total:
                values = (self._cache.block_size, worker.kv_blocks_total, self._cache.enable_prefix_caching)
                info.add_metric((self._model_name, str(worker.rank), *map(str, values)), 1)
        yield info

    def _life_families(self, stats: list[WorkerStats]) -> Iterator[Metric]:
        info = GaugeMetricFamily(
            "amoe:worker_info", "What a worker does, told by labels; always 1.", labels=("worker", "role")
        )
        heartbeat = GaugeMetricFamily(
            "amoe:worker_heartbeat_timestamp_seconds", "Unix time of the last sign of life.", labels=("worker",)
        )
        for worker in stats:
            info.add_metric((str(worker.rank), worker.role), 1)
            if (at := self._heartbeats.get(worker.rank)) is not None:
                heartbeat.add_metric((str(worker.rank),), at)
        yield info
        yield heartbeat


def _queue_families(stats: list[WorkerStats]) -> Iterator[Metric]:
    depth = GaugeMetricFamily("amoe:micro_queue_depth", "Tokens waiting for a block.", labels=_BLOCK_LABELS)
    age = GaugeMetricFamily("amoe:micro_queue_age_seconds", "How long the oldest of them waits.", labels=_BLOCK_LABELS)
    waited = CounterMetricFamily(
        "amoe:micro_queue_token_seconds",
        "Seconds that tokens have waited for a block, summed over the tokens: its rate is the mean depth.",
        labels=_BLOCK_LABELS,
    )
    experts = CounterMetricFamily(
        "amoe:expert_wait_token_seconds",
        "Seconds that tokens have waited for others at an expert worker, in its queues and in their steps, summed over "
        "the tokens: divided by the tokens, the queue age that --autoscale-experts goes by.",
        labels=("worker",),
    )
    for worker in stats:
        for queue in worker.queues:
            values = (str(worker.rank), queue.kind, str(queue.layer))
            depth.add_metric(values, queue.depth)
            age.add_metric(values, queue.age_s)
            waited.add_metric(values, queue.waited_s)
        if worker.role == "experts":
            experts.add_metric((str(worker.rank),), worker.expert_wait_s)
    yield from (depth, age, waited, experts)


def _histogram_families(stats: list[WorkerStats]) -> Iterator[Metric]:
    sizes = HistogramMetricFamily("amoe:block_batch_size", "Tokens per run of a block.", labels=_BLOCK_LABELS)
    waits = HistogramMetricFamily(
        "amoe:join_wait_seconds", "From a token's dispatch to its last answer.", labels=_BLOCK_LABELS
    )
    for worker in stats:
        for family, snapshots, edges in (
            (sizes, worker.batch_sizes, BATCH_SIZE_EDGES),
            (waits, worker.join_waits, JOIN_WAIT_EDGES),
        ):
            for snapshot in snapshots:
                values = (str(worker.rank), snapshot.kind, str(snapshot.layer))
                family.add_metric(values, cumulative(snapshot, edges), sum_value=snapshot.total)
    yield sizes
    yield waits


def _work_families(stats: list[WorkerStats]) -> Iterator[Metric]:
    busy = CounterMetricFamily("amoe:worker_busy_seconds", "Seconds in which a block ran.", labels=("worker", "block"))
    waits = CounterMetricFamily(
        "amoe:worker_wait_seconds",
        "Seconds in which a worker slept: without tokens (idle), with all of them at experts elsewhere (away), or with "
        "tokens that waited for those (held).",
        labels=("worker", "reason"),
    )
    steps = CounterMetricFamily(
        "amoe:worker_steps", "Steps run: single blocks, or all of them as one.", labels=("worker",)
    )
    loops = CounterMetricFamily("amoe:worker_loops", "Turns of a worker's loop.", labels=("worker",))
    decisions = CounterMetricFamily(
        "amoe:scheduler_decisions",
        "Why a worker ran a block (only, policy, overdue, slip), or none (idle, away, held).",
        labels=("worker", "block", "reason"),
    )
    for worker in stats:
        rank = str(worker.rank)
        steps.add_metric((rank,), worker.steps)
        loops.add_metric((rank,), worker.loops)
        for block, seconds in worker.busy_by_block.items():
            busy.add_metric((rank, block), seconds)
        for reason, seconds in worker.wait_s.items():
            waits.add_metric((rank, reason), seconds)
        for decision in worker.decisions:
            decisions.add_metric((rank, decision.block, decision.reason), decision.count)
    yield from (busy, waits, steps, loops, decisions)


def _wave_families(stats: list[WorkerStats]) -> Iterator[Metric]:
    waves = GaugeMetricFamily("amoe:waves", "Waves into which sequences are split.", labels=("worker",))
    slips = CounterMetricFamily(
        "amoe:wave_slips",
        "Waves that went on without somebody for whom they had waited too long.",
        labels=("worker",),
    )
    for worker in stats:
        if worker.num_waves:
            waves.add_metric((str(worker.rank),), worker.num_waves)
            slips.add_metric((str(worker.rank),), worker.num_slips)
    yield waves
    yield slips


def _traffic_families(stats: list[WorkerStats]) -> Iterator[Metric]:
    messages = CounterMetricFamily(
        "amoe:transport_messages", "Batches sent between workers, markers included.", labels=_TRAFFIC_LABELS
    )
    tokens = CounterMetricFamily("amoe:transport_tokens", "Rows in them.", labels=_TRAFFIC_LABELS)
    payload = CounterMetricFamily(
        "amoe:transport_payload_bytes", "Bytes of hidden states in them.", labels=_TRAFFIC_LABELS
    )
    for worker in stats:
        for sent in worker.traffic:
            values = (str(worker.rank), sent.kind, sent.path)
            messages.add_metric(values, sent.messages)
            if sent.kind != "announce":
                tokens.add_metric(values, sent.tokens)
                payload.add_metric(values, sent.payload_bytes)
    yield from (messages, tokens, payload)

"""All series of one engine."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Gauge,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from amoe.config import CacheConfig
from amoe.metrics.cluster import ClusterCollector, LossFamilies, LossKind
from amoe.metrics.experts import ExpertLoad
from amoe.metrics.http import HttpMetrics
from amoe.metrics.lives import WorkerLives
from amoe.metrics.requests import RequestFamilies
from amoe.metrics.steering import SteeringCollector
from amoe.metrics.workers import WorkerCollector
from amoe.stats import ClusterStats, RequestFlow, SteeringStats, WorkerStats
from amoe.types import FinishReason

CONTENT_TYPE = CONTENT_TYPE_LATEST

disable_created_metrics()  # a `_created` twin of every series, which nobody plots


def is_multiprocess() -> bool:
    """Several API processes count into shared files, and each can tell the sums."""
    return "PROMETHEUS_MULTIPROC_DIR" in os.environ


def forget_process(pid: int, directory: str) -> None:
    """One of those that count into the files of `directory` has ended: what it has counted stays, what was so while it
    lived is so no more."""
    mark_process_dead(pid, directory)


class EngineMetrics:
    """What the server tells of requests and workers, in a registry of its own.

    Args:
        cache: configuration of the workers' KV caches.

    Attributes:
        workers: the latest snapshot of each worker, by rank; what it counts is summed over its lives.
        flow: tokens and latencies of the last minutes.
        load: how uneven the load of experts has been in the last seconds.
        http: what the HTTP side counts.
    """

    def __init__(self, model_name: str, max_model_len: int, cache: CacheConfig | None = None) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._lives = WorkerLives()
        self.workers = self._lives.totals
        self.flow = RequestFlow()
        self.load = ExpertLoad()
        self.http = HttpMetrics(self.registry)
        self._heartbeats: dict[int, float] = {}
        self._requests = RequestFamilies(self.registry, model_name, max_model_len)
        self._losses = LossFamilies(self.registry, model_name)
        self._cluster = ClusterCollector(model_name, self.workers)
        self._healthy = Gauge(
            "amoe:engine_healthy",
            "1 while every worker makes progress.",
            ("model_name",),
            registry=self.registry,
            multiprocess_mode="livemin",
        )
        self._healthy.labels(model_name).set(1)
        self._steering = SteeringCollector(model_name)
        # What several API processes count is added up. What workers say all of them hear: whoever is asked tells it.
        self._exposed = self.registry
        if is_multiprocess():
            self._exposed = CollectorRegistry()
            MultiProcessCollector(self._exposed)
        else:
            ProcessCollector(registry=self._exposed)  # CPU, memory and descriptors of the server itself
        self._exposed.register(
            WorkerCollector(model_name, self.workers, self._heartbeats, self.load, cache or CacheConfig())
        )
        self._exposed.register(self._steering)
        self._exposed.register(self._cluster)

    def prepare(self, ranks: Iterable[int]) -> None:
        """Create the request-level series of these attention workers, so that a graph starts at 0."""
        for rank in ranks:
            self._requests.of(rank)

    def first_token(self, rank: int, seconds: float, num_prompt_tokens: int, num_cached_tokens: int) -> None:
        """A request's first token came `seconds` after its arrival: its prompt has been processed."""
        series = self._requests.of(rank)
        self.flow.first_token(seconds, num_prompt_tokens)
        series.observe("time_to_first_token_seconds", seconds)
        series.counters["prompt_tokens"].inc(num_prompt_tokens)
        series.counters["prompt_tokens_cached"].inc(num_cached_tokens)
        series.by_source["local_compute"].inc(num_prompt_tokens - num_cached_tokens)
        series.by_source["local_cache_hit"].inc(num_cached_tokens)

    def tokens(self, rank: int, count: int, seconds_since_last: float | None) -> None:
        """A step brought `count` tokens of one request; None with its first ones."""
        series = self._requests.of(rank)
        self.flow.tokens(count, seconds_since_last)
        series.generation_tokens.inc(count)
        if seconds_since_last is not None:
            series.itl.observe(seconds_since_last)

    def finished(
        self,
        rank: int,
        reason: FinishReason,
        *,
        seconds: float,
        decode_seconds: float | None,
        num_prompt_tokens: int,
        num_generated_tokens: int,
        num_cached_tokens: int = 0,
        max_tokens: int | None = None,
        queue_seconds: float | None = None,
        prefill_seconds: float | None = None,
        num_preemptions: int = 0,
    ) -> None:
        """A sequence ended.

        Args:
            seconds: since its arrival.
            decode_seconds: from its first to its last token; None if it got no token.
            max_tokens: for which it asked.
            queue_seconds, prefill_seconds: before it was first computed, and from there to its first token; None if
                it did not come so far.
        """
        series = self._requests.of(rank)
        series.success[reason].inc()
        has_tokens = decode_seconds is not None
        has_run = has_tokens and prefill_seconds is not None
        for name, value in (
            ("e2e_request_latency_seconds", seconds),
            ("request_queue_time_seconds", queue_seconds),
            ("request_prefill_time_seconds", prefill_seconds),
            ("request_decode_time_seconds", decode_seconds),
            ("request_inference_time_seconds", (prefill_seconds or 0) + (decode_seconds or 0) if has_run else None),
            ("request_prompt_tokens", num_prompt_tokens),
            ("request_generation_tokens", num_generated_tokens),
            ("request_params_max_tokens", max_tokens),
            ("request_num_preemptions", num_preemptions),
            ("request_prefill_kv_computed_tokens", num_prompt_tokens - num_cached_tokens if has_tokens else None),
        ):
            series.observe(name, value)
        if decode_seconds is not None and num_generated_tokens > 1:
            series.observe("request_time_per_output_token_seconds", decode_seconds / (num_generated_tokens - 1))

    def all_choices_finished(self, rank: int, num_choices: int, max_num_generated_tokens: int) -> None:
        """The last of the `num_choices` sequences of one prompt ended; the longest has so many tokens."""
        series = self._requests.of(rank)
        series.observe("request_params_n", num_choices)
        series.observe("request_max_num_generation_tokens", max_num_generated_tokens)

    def rejected(self, reason: str) -> None:
        """A request was refused for want of room, or because the server is going or its engine is dead."""
        self._requests.rejections.labels(self._model_name, reason).inc()

    def worker(self, stats: WorkerStats) -> None:
        """Take a worker's latest snapshot."""
        rank, is_new = stats.rank, stats.rank not in self.workers
        if not self._lives.hear(stats):
            return
        self._heartbeats[rank] = time.time()
        if is_new:
            self._losses.prepare(rank, stats.role)
        self.load.beat(rank, self.workers, self._lives.gone)

    def alive(self, rank: int) -> None:
        """A worker has nothing new to tell but that it lives."""
        if rank not in self._lives.gone:
            self._heartbeats[rank] = time.time()

    # -- who there is ------------------------------------------------------------------------------------------------

    def worker_lost(self, rank: int, role: str, kind: LossKind) -> None:
        """A worker is dead, and what it had under way with it. What it has counted stays."""
        self.count_loss(rank, role, kind)
        self.life_ended(rank)

    def worker_back(self, rank: int, role: str, seconds: float) -> None:
        """A worker that was lost serves again, so long after its loss."""
        self.count_return(rank, role, seconds)
        self.life_begun(rank)

    def count_loss(self, rank: int, role: str, kind: LossKind) -> None:
        """The first half of `worker_lost`: of several API processes one does it."""
        self._losses.lost(rank, role, kind)

    def life_ended(self, rank: int) -> None:
        """The second half of `worker_lost`: each of them does it."""
        self._lives.end(rank)
        self._heartbeats.pop(rank, None)

    def count_return(self, rank: int, role: str, seconds: float) -> None:
        """The first half of `worker_back`: of several API processes one does it."""
        self._losses.back(rank, role, seconds)

    def life_begun(self, rank: int) -> None:
        """The second half of `worker_back`: each of them does it."""
        self._lives.welcome(rank)

    def count_on(self, past: Mapping[int, WorkerStats]) -> None:
        """Before any snapshot: what workers have counted in lives that this process has not seen, by rank."""
        self._lives.count_on(past)

    def worker_removed(self, rank: int) -> None:
        """A worker has left for good: nothing is told of it any more. One that comes to its place later counts on."""
        self._lives.remove(rank)
        self._heartbeats.pop(rank, None)

    def readmitted(self, rank: int, count: int) -> None:
        """So many sequences of a lost attention worker go on elsewhere, or at its next life."""
        self._losses.readmitted(rank, count)

    def experts_moved(self, count: int) -> None:
        """So many (layer, expert) copies were loaded by workers that serve."""
        self._losses.moved(count)

    def clustered(self, state: ClusterStats) -> None:
        """Take who there is."""
        self._cluster.state = state

    def steered(self, state: SteeringStats) -> None:
        """Take what has been made of the snapshots."""
        self._steering.state = state

    def healthy(self, value: bool) -> None:
        """Whether every worker makes progress."""
        self._healthy.labels(self._model_name).set(value)

    def render(self) -> bytes:
        """The text exposition, of content type `CONTENT_TYPE`. It may be called in another thread: with thousands of
        series (61 layers of 256 experts give 36,000) it takes a quarter of a second."""
        self.http.refresh()
        return generate_latest(self._exposed)

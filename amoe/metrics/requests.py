"""Series of requests: vLLM's names, labels and buckets under another prefix."""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram

from amoe.metrics.buckets import (
    CHOICE_BUCKETS,
    LABELS,
    PREEMPTION_BUCKETS,
    PREFIX,
    REQUEST_BUCKETS,
    TOKEN_BUCKETS,
    TTFT_BUCKETS,
    one_two_five_buckets,
)
from amoe.types import FinishReason

REJECTION_REASONS = ("queue_full", "queue_tokens", "queue_time", "stalled", "shutdown", "dead")

_COUNTERS = {
    "prompt_tokens": "Prompt tokens processed.",
    "prompt_tokens_cached": "Prompt tokens found in the prefix cache.",
    "generation_tokens": "Tokens generated.",
}
_TIMES = {
    "time_to_first_token_seconds": ("Seconds from a request's arrival to its first token.", TTFT_BUCKETS),
    "inter_token_latency_seconds": ("Seconds between tokens.", TOKEN_BUCKETS),
    "request_time_per_output_token_seconds": ("A request's mean seconds per later token.", TOKEN_BUCKETS),
    "e2e_request_latency_seconds": ("Seconds of a whole request.", REQUEST_BUCKETS),
    "request_queue_time_seconds": ("Seconds in which a request waited to be computed.", REQUEST_BUCKETS),
    "request_prefill_time_seconds": ("Seconds from a request's first computation to its first token.", REQUEST_BUCKETS),
    "request_decode_time_seconds": ("Seconds from a request's first to its last token.", REQUEST_BUCKETS),
    "request_inference_time_seconds": (
        "Seconds from a request's first computation to its last token.",
        REQUEST_BUCKETS,
    ),
}
_SIZES = {
    "request_prompt_tokens": "Prompt tokens of a request.",
    "request_generation_tokens": "Tokens that a request got.",
    "request_max_num_generation_tokens": "Tokens of the longest choice of a request.",
    "request_params_max_tokens": "Tokens for which a request asked at most.",
    "request_prefill_kv_computed_tokens": "Prompt tokens of a request that were not in the prefix cache.",
}


class RankSeries:
    """The series of one attention worker. What happens with every token costs no look-up of labels.

    Attributes:
        counters, histograms: by name without prefix.
        by_source: `prompt_tokens_by_source`, by source.
        success: `request_success`, by reason.
    """

    def __init__(self, families: RequestFamilies, labels: tuple[str, str]) -> None:
        self.counters = {name: family.labels(*labels) for name, family in families.counters.items()}
        self.histograms = {name: family.labels(*labels) for name, family in families.histograms.items()}
        self.by_source = {
            source: families.by_source.labels(*labels, source) for source in ("local_compute", "local_cache_hit")
        }
        self.success = {reason: families.success.labels(*labels, reason) for reason in get_args(FinishReason)}
        self.itl = self.histograms["inter_token_latency_seconds"]
        self.generation_tokens = self.counters["generation_tokens"]

    def observe(self, name: str, value: float | None) -> None:
        """Into the histogram `name`; None is not known, and not observed."""
        if value is not None:
            self.histograms[name].observe(value)


class RequestFamilies:
    """Registers every family of requests, once.

    Args:
        max_model_len: where the buckets of sizes end.
    """

    def __init__(self, registry: CollectorRegistry, model_name: str, max_model_len: int) -> None:
        self._model_name = model_name
        sizes = one_two_five_buckets(max_model_len)
        buckets: dict[str, tuple[str, Iterable[float]]] = {
            **_TIMES,
            **{name: (documentation, sizes) for name, documentation in _SIZES.items()},
            "request_params_n": ("Choices for which a request asked.", CHOICE_BUCKETS),
            "request_num_preemptions": ("Times that a request lost its KV cache to others.", PREEMPTION_BUCKETS),
        }
        self.counters = {
            name: Counter(PREFIX + name, documentation, LABELS, registry=registry)
            for name, documentation in _COUNTERS.items()
        }
        self.histograms = {
            name: Histogram(PREFIX + name, documentation, LABELS, buckets=tuple(edges), registry=registry)
            for name, (documentation, edges) in buckets.items()
        }
        self.by_source = Counter(
            f"{PREFIX}prompt_tokens_by_source",
            "Prompt tokens, by where their KV came from.",
            (*LABELS, "source"),
            registry=registry,
        )
        self.success = Counter(
            f"{PREFIX}request_success", "Requests ended.", (*LABELS, "finished_reason"), registry=registry
        )
        self.rejections = Counter(
            f"{PREFIX}admission_rejections", "Requests refused.", ("model_name", "reason"), registry=registry
        )
        for reason in REJECTION_REASONS:
            self.rejections.labels(model_name, reason)
        self._of_rank: dict[int, RankSeries] = {}

    def of(self, rank: int) -> RankSeries:
        """The series of an attention worker, made (all of them, at 0) when it is first asked for."""
        series = self._of_rank.get(rank)
        if series is None:
            series = self._of_rank[rank] = RankSeries(self, (self._model_name, str(rank)))
        return series

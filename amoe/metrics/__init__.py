"""The only place that names a metric.

Request-level series are vLLM's under another prefix: same suffixes, labels and buckets, so that replacing `vllm:` by
`amoe:` ports a dashboard. Worker series come from the snapshots that workers send with each heartbeat.
"""

from amoe.metrics.buckets import one_two_five_buckets
from amoe.metrics.cluster import LOSS_KINDS, LossKind
from amoe.metrics.engine import CONTENT_TYPE, EngineMetrics
from amoe.metrics.experts import ExpertLoad
from amoe.metrics.http import HttpMetrics

__all__ = [
    "CONTENT_TYPE",
    "LOSS_KINDS",
    "EngineMetrics",
    "ExpertLoad",
    "HttpMetrics",
    "LossKind",
    "one_two_five_buckets",
]

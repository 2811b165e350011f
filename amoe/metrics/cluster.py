"""Series of who there is: losses of workers, recoveries, and what the cluster is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from amoe.metrics.buckets import LABELS, PREFIX, RECOVERY_BUCKETS
from amoe.stats import ClusterStats, WorkerStats

LossKind = Literal["exit", "silent", "hung", "cut", "start"]
LOSS_KINDS: tuple[str, ...] = get_args(LossKind)
WORKER_STATES = ("starting", "serving", "draining", "lost", "waiting")

_CLUSTER_GAUGES: tuple[tuple[str, str, Callable[[ClusterStats], float]], ...] = (
    ("topology_version", "Changes of who serves, and of where experts are computed.", lambda c: c.version),
    ("experts_missing", "(layer, expert) pairs that nobody holds.", lambda c: c.num_missing),
    ("expert_replicas", "(layer, expert) copies beyond one each.", lambda c: c.num_replicas),
    ("expert_workers_wanted", "Workers with experts that there ought to be.", lambda c: c.num_wanted),
    ("expert_workers_serving", "Workers with experts that serve.", lambda c: c.num_serving),
    ("expert_workers_max", "Workers with experts that there may be.", lambda c: c.num_most),
)


class LossFamilies:
    """Counts what happens to workers. Registers its families once."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._model_name = model_name
        self._losses = Counter(
            f"{PREFIX}worker_losses",
            "Workers lost: their process ended (exit), gave no sign of life (silent), hung in a step (hung) or could "
            "not be reached by others (cut); or they ended while they were started anew (start).",
            ("worker", "role", "kind"),
            registry=registry,
        )
        self._respawns = Counter(
            f"{PREFIX}worker_respawns",
            "Workers that serve again after they were lost.",
            ("worker", "role"),
            registry=registry,
        )
        self._recovery = Histogram(
            f"{PREFIX}worker_recovery_seconds",
            "From the loss of a worker until it serves again.",
            ("role",),
            buckets=RECOVERY_BUCKETS,
            registry=registry,
        )
        self._readmitted = Counter(
            f"{PREFIX}requests_readmitted",
            "Open sequences of a lost attention worker that went on elsewhere, or at its next life.",
            LABELS,
            registry=registry,
        )
        self._moved = Counter(
            f"{PREFIX}experts_moved",
            "(layer, expert) copies that a worker has loaded while it served.",
            ("model_name",),
            registry=registry,
        )
        self._moved.labels(model_name)

    def prepare(self, rank: int, role: str) -> None:
        """Create the series of a worker, so that a graph starts at 0."""
        for kind in LOSS_KINDS:
            self._losses.labels(str(rank), role, kind)
        self._respawns.labels(str(rank), role)
        self._recovery.labels(role)
        if role != "experts":
            self._readmitted.labels(self._model_name, str(rank))

    def lost(self, rank: int, role: str, kind: LossKind) -> None:
        """A worker was lost."""
        self._losses.labels(str(rank), role, kind).inc()

    def back(self, rank: int, role: str, seconds: float) -> None:
        """A worker serves again."""
        self._respawns.labels(str(rank), role).inc()
        self._recovery.labels(role).observe(seconds)

    def readmitted(self, rank: int, count: int) -> None:
        """`count` sequences of worker `rank` were re-admitted."""
        self._readmitted.labels(self._model_name, str(rank)).inc(count)

    def moved(self, count: int) -> None:
        """So many copies of experts were loaded."""
        self._moved.labels(self._model_name).inc(count)


class ClusterCollector(Collector):
    """Names what is so at the moment.

    Args:
        workers: the latest snapshot of each, by rank; filled by others.

    Attributes:
        state: the latest; None: nobody supervises the workers, and whoever speaks serves.
    """

    def __init__(self, model_name: str, workers: Mapping[int, WorkerStats]) -> None:
        self._model_name = model_name
        self._workers = workers
        self.state: ClusterStats | None = None

    def collect(self) -> Iterator[Metric]:
        """The states of the workers, and what else is known."""
        cluster = self.state
        if cluster is None:
            states = {rank: (stats.role, "serving") for rank, stats in dict(self._workers).items()}
        else:
            states = cluster.states
        yield _state_family(states)
        yield from self._cluster_families(cluster)

    def _cluster_families(self, cluster: ClusterStats | None) -> Iterator[Metric]:
        for name, documentation, value in _CLUSTER_GAUGES:
            family = GaugeMetricFamily(PREFIX + name, documentation, labels=("model_name",))
            if cluster is not None:
                family.add_metric((self._model_name,), value(cluster))
            yield family


def _state_family(states: Mapping[int, tuple[str, str]]) -> Metric:
    family = GaugeMetricFamily(
        f"{PREFIX}worker_state",
        "1 in the state that a worker is in, 0 in the others.",
        labels=("worker", "role", "state"),
    )
    for rank, (role, now) in sorted(states.items()):
        for state in WORKER_STATES:
            family.add_metric((str(rank), role, state), float(state == now))
    return family


def redo_families(homes: list[WorkerStats]) -> Iterator[Metric]:
    """What attention workers have done again because of lost workers and answers."""
    labels = ("worker",)
    redone = CounterMetricFamily(
        f"{PREFIX}tokens_redone", "Dispatches begun again: a worker that owed answers was lost.", labels=labels
    )
    resent = CounterMetricFamily(
        f"{PREFIX}tokens_resent", "Dispatches sent again: an answer had not come in time.", labels=labels
    )
    parked = GaugeMetricFamily(
        f"{PREFIX}tokens_parked", "Tokens that wait for an expert that nobody holds.", labels=labels
    )
    for worker in homes:
        rank = (str(worker.rank),)
        redone.add_metric(rank, worker.redone_tokens)
        resent.add_metric(rank, worker.resent_tokens)
        parked.add_metric(rank, worker.parked_tokens)
    yield from (redone, resent, parked)

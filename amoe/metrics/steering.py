"""Series of what steering knows and does."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from amoe.stats import SteeringStats


class SteeringCollector(Collector):
    """Names what steering knows and does.

    Attributes:
        state: the latest.
    """

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

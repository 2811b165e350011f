"""From two moments of the engine to what the page shows."""

from __future__ import annotations

import asyncio
import base64
import json
from types import SimpleNamespace

import pytest

from amoe.clock import ManualClock
from amoe.cluster.admin import ClusterStatus, WorkerStatus
from amoe.config import EngineConfig
from amoe.server.page.snapshot import Snapshot, Totals
from amoe.server.page.source import LiveSource
from amoe.server.page.view import LEVELS_PER_MEAN, live_view
from amoe.stats import CapacitySnapshot, HistogramSnapshot, QueueSnapshot, RequestFlow, WorkerStats


def worker(rank: int, at_s: float, role: str = "colocated", **fields: object) -> WorkerStats:
    stats = WorkerStats(rank=rank, role=role, at_s=at_s)
    for name, value in fields.items():
        setattr(stats, name, value)
    return stats


def moment(at_s: float, *workers: WorkerStats, flow: RequestFlow | None = None, **fields: object) -> Snapshot:
    samples = [] if flow is None else [*flow.samples, flow.now(at_s)]
    table = {stats.rank: stats for stats in workers}
    return Snapshot(at_s=at_s, workers=table, totals=Totals.of(workers), flow=samples, **fields)


def histogram(kind: str, layer: int, count: int, total: float) -> HistogramSnapshot:
    return HistogramSnapshot(kind, layer, [0, count] + [0] * 11, total)


class TestExperts:
    def view(self, before: list[list[int]], after: list[list[int]], seconds: float = 2.0) -> dict:
        first, last = worker(0, 10.0, expert_pairs=before), worker(0, 10.0 + seconds, expert_pairs=after)
        return live_view(moment(0.0, first), moment(seconds, last))["experts"]

    def test_a_cell_is_the_load_relative_to_the_mean_of_its_layer(self):
        view = self.view([[0, 0, 0, 0], [5, 5, 5, 5]], [[80, 0, 40, 40], [5, 5, 5, 5]])
        levels = list(base64.b64decode(view["levels"]))
        assert levels == [2 * LEVELS_PER_MEAN, 0, LEVELS_PER_MEAN, LEVELS_PER_MEAN, 0, 0, 0, 0]
        assert view["mean"] == [20.0, 0.0]
        assert view["imbalance"] == [2.0, None]
        assert view["hottest"] == [0, None]
        assert (view["layers"], view["experts"], view["known"]) == (2, 4, True)

    def test_the_hottest_of_many_does_not_overflow_its_byte(self):
        view = self.view([[0] * 64], [[1000] + [0] * 63])
        assert max(base64.b64decode(view["levels"])) == 255
        assert view["imbalance"] == [64.0]

    def test_workers_are_added_up(self):
        before = moment(0.0, worker(0, 1.0, expert_pairs=[[0, 0]]), worker(1, 1.0, expert_pairs=[[0, 0]]))
        after = moment(2.0, worker(0, 3.0, expert_pairs=[[4, 0]]), worker(1, 3.0, expert_pairs=[[0, 12]]))
        assert live_view(before, after)["experts"]["mean"] == [4.0]

    def test_unknown_at_first(self):
        view = live_view(None, moment(0.0, worker(0, 1.0, expert_pairs=[[4, 0]])))
        assert view["experts"]["known"] is False and view["window_s"] is None
        assert live_view(None, moment(0.0))["experts"] is None

    def test_a_worker_that_tells_for_the_first_time_makes_no_rate(self):
        before = moment(0.0, worker(0, 1.0, "attention"))
        after = moment(2.0, worker(0, 3.0, "attention"), worker(1, 3.0, "experts", expert_pairs=[[9, 9]]))
        assert live_view(before, after)["experts"]["known"] is False


class TestLayers:
    def test_queues_are_means_over_the_window(self):
        before = worker(0, 10.0, queues=[QueueSnapshot("attention", 0, 9, 0.5, waited_s=1.0, ran_s=2.0)])
        after = worker(0, 14.0, queues=[QueueSnapshot("attention", 0, 3, 0.25, waited_s=9.0, ran_s=4.0)])
        layers = live_view(moment(0.0, before), moment(4.0, after))["layers"]
        assert layers["count"] == 1
        assert layers["attention"]["waiting"] == [2.0]
        assert layers["attention"]["running"] == [0.5]
        assert (layers["attention"]["depth"], layers["attention"]["age_s"]) == ([3], [0.25])

    def test_the_head_is_no_layer(self):
        queues = [QueueSnapshot("attention", layer, 1, 0.1) for layer in (0, 1)] + [QueueSnapshot("head", 2, 4, 0.2)]
        layers = live_view(None, moment(0.0, worker(0, 1.0, queues=queues)))["layers"]
        assert layers["count"] == 2
        assert layers["head"]["depth"] == [4]
        assert layers["attention"]["waiting"] is None

    def test_batches_and_joins(self):
        queues = [QueueSnapshot(kind, 0, 0, 0.0) for kind in ("attention", "experts")]
        before = worker(0, 1.0, queues=queues, batch_sizes=[histogram("experts", 0, 10, 100.0)])
        after = worker(
            0,
            3.0,
            queues=queues,
            batch_sizes=[histogram("experts", 0, 14, 148.0)],
            join_waits=[histogram("experts", 0, 4, 0.02)],
        )
        layers = live_view(moment(0.0, before), moment(2.0, after))["layers"]
        assert (layers["experts"]["batch"], layers["attention"]["batch"]) == ([12.0], [None])
        assert layers["experts"]["tokens"] == [24.0]
        assert layers["join_wait_s"] == [pytest.approx(0.005)]


class TestWorkers:
    def test_busy_by_its_own_clock(self):
        before, after = worker(0, 100.0, home_s=5.0, experts_s=1.0), worker(0, 104.0, home_s=6.0, experts_s=3.0)
        (view,) = live_view(moment(0.0, before), moment(1.0, after))["workers"]
        assert (view["busy_home"], view["busy_experts"]) == (0.25, 0.5)

    def test_more_than_all_of_the_time_is_all_of_it(self):
        before, after = worker(0, 100.0, home_s=5.0), worker(0, 101.0, home_s=9.0)
        (view,) = live_view(moment(0.0, before), moment(1.0, after))["workers"]
        assert view["busy_home"] == 1.0

    def test_a_silent_one_is_told(self):
        snapshot = moment(0.0, worker(0, 1.0), worker(1, 1.0), silent_s={0: 0.4, 1: 7.04})
        assert [view["silent_s"] for view in live_view(None, snapshot)["workers"]] == [None, 7.0]

    def test_experts_have_no_sequences(self):
        (view,) = live_view(None, moment(0.0, worker(3, 1.0, "experts", num_running=0)))["workers"]
        assert (view["rank"], view["running"], view["in_flight"], view["kv_used"]) == (3, None, None, None)

    def test_sums_over_attention_workers(self):
        homes = [worker(r, 1.0, num_running=2, num_waiting=1, kv_blocks_used=1, kv_blocks_total=4) for r in (0, 1)]
        requests = live_view(None, moment(0.0, *homes, num_open=7))["requests"]
        assert (requests["open"], requests["running"], requests["waiting"]) == (7, 4, 2)
        assert (requests["kv_used"], requests["prefix_hits"]) == (0.25, None)


class TestLives:
    CLUSTER = ClusterStatus(
        version=9,
        workers=[
            WorkerStatus(rank=0, title="attention 0", role="attention", state="serving", incarnation=1, lives=2),
            WorkerStatus(rank=1, title="expert 0", role="experts", state="lost", reason="killed by SIGKILL"),
            WorkerStatus(rank=2, title="expert 1", role="experts", state="waiting", num_crashes=3, retry_s=2.04),
            WorkerStatus(rank=3, title="expert 2", role="experts", state="starting"),
        ],
        num_expert_workers=3,
        max_expert_workers=4,
        num_replicas=2,
        missing=8,
        action="moving 3 of 12 experts",
    )

    def test_the_cluster(self):
        assert live_view(None, moment(0.0, cluster=self.CLUSTER))["cluster"] == {
            "version": 9,
            "expert_workers": 3,
            "max_expert_workers": 4,
            "replicas": 2,
            "missing": 8,
            "action": "moving 3 of 12 experts",
        }

    def test_each_place_is_there_whether_it_has_told_anything_or_not(self):
        stats = (worker(0, 1.0, "attention", num_running=5), worker(1, 1.0, "experts"))
        views = live_view(None, moment(0.0, *stats, cluster=self.CLUSTER, silent_s={0: 9.0, 1: 9.0}))["workers"]
        assert [(view["rank"], view["state"]) for view in views] == list(
            zip(range(4), ("serving", "lost", "waiting", "starting"), strict=True)
        )
        assert [view["silent_s"] for view in views] == [9.0, None, None, None], "the lost are not silent besides"
        assert (views[0]["life"], views[0]["running"], views[0]["title"]) == (2, 5, "attention 0")
        assert views[1]["last_end"] == "killed by SIGKILL" and views[0]["last_end"] is None
        assert (views[2]["crashes"], views[2]["retry_s"]) == (3, 2.0)
        assert (views[3]["queued"], views[3]["busy_home"], views[3]["running"]) == (0, None, None)

    def test_the_lost_are_busy_with_nothing(self):
        before, after = worker(1, 1.0, "experts"), worker(1, 3.0, "experts", experts_s=1.0)
        lost = moment(2.0, after, cluster=self.CLUSTER)
        views = live_view(moment(0.0, before), lost)["workers"]
        assert [view["busy_experts"] for view in views if view["rank"] == 1] == [None]
        (view,) = live_view(moment(0.0, before), moment(2.0, after))["workers"]
        assert view["busy_experts"] == 0.5

    def test_without_a_supervisor(self):
        view = live_view(None, moment(0.0, worker(0, 1.0)))
        assert view["cluster"] is None
        assert [view["workers"][0][name] for name in ("title", "state", "silent_s")] == [None, None, None]

    def test_what_is_the_matter(self):
        assert live_view(None, moment(0.0))["word"] is None
        assert live_view(None, moment(0.0, word="expert 1 is replaced"))["word"] == "expert 1 is replaced"


class TestFlow:
    def test_throughput_now_and_lately(self):
        flow = RequestFlow()
        for second in range(10):
            flow.mark(float(second))
            flow.tokens(10 if second < 5 else 30, 0.02)
            flow.first_token(0.1, 5)
        view = live_view(None, moment(10.0, flow=flow))
        throughput = view["throughput"]
        assert (throughput["generated"], throughput["prompt"]) == (30.0, 5.0)
        assert throughput["history"]["generated"] == [10.0] * 5 + [30.0] * 5
        assert throughput["history"]["seconds"] == [float(age) for age in range(9, -1, -1)]
        assert view["latency"]["itl"]["count"] == 10
        assert view["latency"]["itl"]["p50"] == pytest.approx(0.02, rel=0.16)
        assert view["latency"]["ttft"]["p99"] == pytest.approx(0.1, rel=0.16)

    def test_latency_forgets(self):
        flow = RequestFlow()
        flow.tokens(1, 5.0)
        for second in range(100):
            flow.mark(float(second))
        assert live_view(None, moment(100.0, flow=flow))["latency"]["itl"] == {"count": 0, "p50": None, "p99": None}

    def test_nothing_is_known_at_first(self):
        assert live_view(None, moment(0.0, flow=RequestFlow()))["throughput"]["generated"] is None


class TestCapacity:
    def snapshot(self, at_s: float, pairs: int, dropped: int, rerouted: int) -> Snapshot:
        capacity = CapacitySnapshot("factor", [[0, 1, dropped, rerouted]], 0, dropped * 0.1, 10 * dropped)
        return moment(at_s, worker(0, at_s, expert_pairs=[[pairs, 0]], capacity=capacity))

    def test_rates_and_share(self):
        view = live_view(self.snapshot(0.0, 0, 0, 0), self.snapshot(2.0, 80, 20, 5))["capacity"]
        assert (view["dropped"], view["rerouted"]) == (10.0, 2.5)
        assert view["share"] == 0.25
        assert view["gate_mass_lost"] == pytest.approx(0.01)

    def test_unknown_at_first_and_absent_when_off(self):
        assert live_view(None, self.snapshot(1.0, 8, 2, 0))["capacity"]["dropped"] is None
        assert live_view(None, moment(0.0, worker(0, 1.0)))["capacity"] is None


class TestSource:
    @pytest.fixture
    def clock(self) -> ManualClock:
        return ManualClock(100.0)

    @pytest.fixture
    def workers(self) -> dict[int, WorkerStats]:
        return {}

    @pytest.fixture
    def source(self, clock: ManualClock, workers: dict[int, WorkerStats]) -> LiveSource:
        engine = SimpleNamespace(
            metrics=SimpleNamespace(workers=workers, flow=RequestFlow()),
            num_open=0,
            healthy=True,
            complaint="",
            note="",
            model=SimpleNamespace(max_model_len=64),
            config=EngineConfig(model="x"),
        )
        return LiveSource(SimpleNamespace(engine=engine, model_names=("m",), created=5, admin=None), clock)

    async def test_rates_are_over_the_last_seconds(self, source, clock, workers):
        for second in range(12):
            workers[0] = worker(0, float(second), home_s=0.5 * second if second < 6 else 3.0)
            view = json.loads(await source.read())
            clock.advance(1.0)
        assert view["window_s"] == 5.0
        assert view["workers"][0]["busy_home"] == 0.0

    async def test_what_was_long_ago_is_forgotten(self, source, clock, workers):
        workers[0] = worker(0, 1.0)
        await source.read()
        clock.advance(600.0)
        workers[0] = worker(0, 601.0, home_s=300.0)
        view = json.loads(await source.read())
        assert view["window_s"] is None and view["workers"][0]["busy_home"] is None

    async def test_a_silent_worker_is_noticed(self, source, clock, workers):
        workers[0] = worker(0, 1.0)
        for _ in range(5):
            view = json.loads(await source.read())
            clock.advance(1.0)
        assert view["workers"][0]["silent_s"] == 4.0

    async def test_one_answer_per_second(self, source, clock, workers):
        workers[0] = worker(0, 1.0)
        answers = await asyncio.gather(*(source.read() for _ in range(5)))
        assert len(set(map(id, answers))) == 1
        clock.advance(1.0)
        assert await source.read() is not answers[0]

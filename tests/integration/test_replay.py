"""Two shells, one core: the simulator repeats what the engine's workers did, and the other way round."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from amoe.config import CacheConfig, CapacityConfig, EngineConfig, PlacementConfig, SchedulerConfig
from amoe.core.members import Roster
from amoe.core.trace import Trace, encode_roster, record
from amoe.core.worker import ModelShape, WorkerCore
from amoe.engine.messages import AbortRequests, AddRequest, Steer
from amoe.engine.topology import roster_of
from amoe.engine.worker import Worker
from amoe.engine.worker_stats import StatsKeeper
from amoe.models.config import load_model_config
from amoe.profiles.routing import log_normal_routing
from amoe.sim.replay import RecordedAnswers, Turn, load_trace, new_request, replay, save_trace
from amoe.sim.replicas import with_replicas
from amoe.sim.simulator import Simulator
from amoe.sim.workload import Lengths, Workload
from amoe.types import SamplingParams
from tests.cluster import InprocCluster
from tests.integration.elastic import ELASTIC, ElasticCluster, skewed
from tests.integration.exactness import Case
from tests.unit.sim.cases import SIZES, make_config

PLACEMENTS = {"colocated2": PlacementConfig(colocated=2), "1A1E": PlacementConfig(expert_workers=1)}
SCHEDULES = [("progress", 1), ("defrag", 1), ("waves", 1), ("lockstep", 2)]


@pytest.fixture(scope="module")
def record_cluster(checkpoint_factory):
    """Runs prompts of mixed lengths, one of which is aborted, with too few KV blocks; returns a trace per worker."""

    def run(placement: str, schedule: str, micro_batches: int) -> list[Trace]:
        path = checkpoint_factory("qwen3_moe", 3, num_hidden_layers=3, mlp_only_layers=[1])
        config = EngineConfig(
            model=str(path),
            max_model_len=64,
            threads_per_worker=1,
            placement=PLACEMENTS[placement],
            scheduler=SchedulerConfig(
                schedule=schedule, micro_batches=micro_batches, max_num_seqs=5, max_num_batched_tokens=24
            ),
            cache=CacheConfig(block_size=4, num_blocks=18),
        )
        model = load_model_config(path)
        cluster = InprocCluster(config, seed=1)
        shape = ModelShape(model.sparse_layers, model.num_experts)
        traces = [record(worker.core, config, shape) for worker in cluster.workers]
        rng = np.random.default_rng(0)
        prompts = [rng.integers(3, 101, size=length).tolist() for length in (1, 30, 7, 19, 40, 3, 12, 25)]
        plain = SamplingParams(max_tokens=9, temperature=0.0)
        params = [replace(plain, prompt_logprobs=(0 if index % 3 == 0 else None)) for index in range(len(prompts))]
        ids = [cluster.add(*request) for request in zip(prompts, params, strict=True)]
        for _ in range(12):
            cluster.turn()
        cluster.abort(ids[1])
        cluster.run()
        cluster.settle()
        cluster.close()
        return traces

    return run


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(("schedule", "micro_batches"), SCHEDULES)
def test_the_simulator_decides_as_the_engine_did(record_cluster, tmp_path, placement, schedule, micro_batches):
    traces = record_cluster(placement, schedule, micro_batches)
    calls = {entry.call for trace in traces for entry in trace.entries}
    assert calls == {"add", "abort", "on_batch", "start", "next_step", "on_attention", "on_head", "retry"}
    assert any(entry.said[1]["preemptions"] for entry in traces[0].entries if entry.call == "start")
    for trace in traces:
        assert replay(trace) is None
        save_trace(trace, tmp_path / "trace")
        loaded = load_trace(tmp_path / "trace")
        assert loaded == trace
        assert replay(loaded) is None


def test_the_simulator_repeats_one_worker_that_runs_all_layers_at_once(checkpoint_factory, tmp_path):
    """With preemption, an abort, scored prompts and a user who asks for experts."""
    path = checkpoint_factory("qwen3_moe", 3, num_hidden_layers=3, mlp_only_layers=[1])
    config = EngineConfig(
        model=str(path),
        max_model_len=64,
        threads_per_worker=1,
        scheduler=SchedulerConfig(schedule="forward", max_num_seqs=5, max_num_batched_tokens=24),
        cache=CacheConfig(block_size=4, num_blocks=18),
    )
    model = load_model_config(path)
    cluster = InprocCluster(config, seed=1)
    trace = record(cluster.workers[0].core, config, ModelShape(model.sparse_layers, model.num_experts))
    rng = np.random.default_rng(0)
    plain = SamplingParams(max_tokens=9, temperature=0.0)
    for index, length in enumerate((1, 30, 7, 19, 40, 3, 12, 25)):
        params = replace(plain, prompt_logprobs=0 if index % 3 == 0 else None, return_routed_experts=index == 2)
        cluster.add(rng.integers(3, 101, size=length).tolist(), params)
    for _ in range(4):
        cluster.turn()
    cluster.abort(1)
    cluster.run()
    cluster.settle()
    cluster.close()
    calls = {entry.call for entry in trace.entries}
    assert calls == {"add", "abort", "start", "next_step", "on_forward", "on_head", "observe"}
    assert any(entry.said[1]["preemptions"] for entry in trace.entries if entry.call == "start")
    assert any(entry.given["expert_ids"] for entry in trace.entries if entry.call == "on_forward")
    save_trace(trace, tmp_path / "trace")
    loaded = load_trace(tmp_path / "trace")
    assert loaded == trace
    assert replay(loaded) is None


class RecordedCluster(ElasticCluster):
    """Every life of every worker is recorded."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.traces = [self._record(rank, self._owners) for rank in range(len(self.workers))]

    def start(self, rank: int, incarnation: int = 0) -> None:
        owners = roster_of(self.board.topology, self.num_experts).owners
        super().start(rank, incarnation)
        self.traces.append(self._record(rank, owners))

    def _record(self, rank: int, owners: np.ndarray) -> Trace:
        core = self.workers[rank].core
        return record(core, self.config, ModelShape(self.sparse, self.num_experts), owners)

    @property
    def num_experts(self) -> int:
        return self._owners.shape[1]


@pytest.mark.parametrize("schedule", [("waves", 2), ("progress", 1), ("defrag", 1)], ids=str)
async def test_what_all_decide_while_workers_come_and_go_is_repeated(schedule, tmp_path):
    """A worker joins, experts move, one dies in the middle and comes back: homes, survivors, and the next life."""
    cluster = RecordedCluster(Case(*schedule, "qwen3_moe", "2A2E", "plain", 1), tmp_path, ELASTIC)

    async def script() -> None:
        cluster.start(4)
        await cluster.manager.take_in(4)
        cluster.load = skewed(cluster, 1)
        moving = asyncio.create_task(cluster.manager.rebalance())
        for _ in range(6):
            await asyncio.sleep(0)
        cluster.kill(2)
        for _ in range(20):
            await asyncio.sleep(0)
        cluster.start(2, 1)
        await moving

    await cluster.serve_while(script())
    cluster.check()
    told = [[entry for entry in trace.entries if entry.call == "on_roster"] for trace in cluster.traces]
    assert all(len(entries) >= 3 for entries in told[:2])
    assert any(entry.said for entry in (*told[0], *told[1])), "a home had to send something anew"
    assert [trace.origin.incarnation for trace in cluster.traces] == [0, 0, 0, 0, 0, 1]
    cluster.finish()
    for trace in cluster.traces:
        save_trace(trace, tmp_path / "trace")
        assert replay(load_trace(tmp_path / "trace")) is None


def test_another_roster_makes_a_difference(record_cluster):
    trace = record_cluster("1A1E", "progress", 1)[0]
    nobody = Roster(1, [0, -1], np.zeros((3, 7, 1), np.int16))
    lines = [json.loads(line) for line in trace.to_lines()]
    lines.insert(100, ["on_roster", 0.0, encode_roster(nobody), []])
    difference = replay(Trace.from_lines(json.dumps(line) for line in lines))
    assert difference is not None


TAMPERINGS = {
    "next_step": lambda entry: replace(entry, said=entry.said | {"slots": [*entry.said["slots"], 0]}),
    "on_attention": lambda entry: replace(entry, said=entry.said[1:]),
    "on_batch": lambda entry: replace(entry, said=[not kept for kept in entry.said]),
    "start": lambda entry: replace(entry, said=[entry.said[0], entry.said[1] | {"kv_blocks": 99}]),
}


@pytest.mark.parametrize("call", TAMPERINGS)
def test_a_trace_that_was_tampered_with_is_found_out(record_cluster, call):
    trace = record_cluster("1A1E", "progress", 1)[0]
    index, entry = next(
        (index, entry) for index, entry in enumerate(trace.entries) if entry.call == call and entry.said and index > 20
    )
    tampered = Trace(trace.origin, [*trace.entries[:index], TAMPERINGS[call](entry), *trace.entries[index + 1 :]])
    difference = replay(tampered)
    assert difference is not None
    assert (difference.index, difference.call, difference.where[:4]) == (index, call, "said")


def test_another_answer_of_the_router_makes_a_difference(record_cluster):
    trace = record_cluster("colocated2", "progress", 1)[0]
    text = [json.loads(line) for line in trace.to_lines()]
    entry = next(line for line in text[100:] if line[0] == "on_attention" and line[2]["topk_ids"])
    entry[2]["topk_ids"] = [[(expert + 4) % 7 for expert in pair] for pair in entry[2]["topk_ids"]]
    difference = replay(Trace.from_lines(json.dumps(line) for line in text))
    assert difference is not None
    assert difference.call == "on_attention"


class EngineShell:
    """The engine's own loop around a core, with doubles for all that it touches."""

    def __init__(self, core: WorkerCore) -> None:
        self.answers = RecordedAnswers()
        self.now = 0.0
        self.messages: list = []
        self.batches: list = []
        shape = (SIZES.num_layers, SIZES.num_experts)
        home = FakeHome(core, self) if core.attention is not None else None
        self.worker = Worker(
            core,
            home,
            home,
            FakeExperts(),
            transport=self,
            control=self,
            clock=FakeClock(self),
            stats=StatsKeeper(0, "x", *shape),
        )
        self.worker._next_heartbeat = float("inf")

    def run(self, turn: Turn) -> None:
        self.answers.entries = turn.answers
        self.answered_at = turn.answered_at
        self.now = turn.now
        self.messages = [_to_message(message) for message in turn.messages]
        self.batches = turn.batches
        self.worker._next_control = 0.0
        # It gives signs of life, and asks again for what it is owed, when the core that was recorded did.
        self.worker._next_sign = float("inf") if turn.retried_at is None else 0.0
        self.worker.turn()

    def receive(self):
        return self.messages

    def poll(self):
        return self.batches

    def send(self, item) -> None:
        pass

    def flush(self) -> bool:
        return True


def _to_message(entry) -> AddRequest | AbortRequests | Steer:
    if entry.call == "abort":
        return AbortRequests([entry.given])
    if entry.call == "set_shares":
        return Steer(np.array(entry.given, "<f4").tobytes())
    request = new_request(entry)
    told = (request.num_generated, request.num_routed)
    return AddRequest(request.request_id, request.prompt_token_ids.tolist(), request.params, request.sibling_of, *told)


class FakeClock:
    def __init__(self, shell: EngineShell) -> None:
        self.shell = shell

    def now(self) -> float:
        return self.shell.now


class FakeExperts:
    def experts(self, step) -> None:
        return None


class FakeHome:
    """As `amoe.engine.home.Home` and `AttentionSide`, with recorded answers instead of kernels."""

    def __init__(self, core: WorkerCore, shell: EngineShell) -> None:
        self.core = core.attention
        self.answers = shell.answers
        self.shell = shell

    def add(self, message: AddRequest) -> None:
        token_ids = np.array(message.prompt_token_ids, np.int32)
        told = {"num_generated": message.num_generated, "num_routed": message.num_routed}
        self.core.batcher.add(message.request_id, token_ids, message.params, message.sibling_of, **told)

    is_compiling = False
    moe_inputs = None

    def poll(self) -> None:
        """No request brings a grammar."""

    def steer(self, message: Steer) -> None:
        self.core.set_shares(np.frombuffer(message.shares, "<f4").reshape(self.core.replica_shape))

    def run(self, step, now):
        assert self.answers.is_for(step)
        # The simulator tells the core when the step has ended, the engine when it has begun.
        at = self.shell.answered_at
        routing = self.answers.route(step, now)
        if routing is None:
            return self.core.on_attention(step, None, None, at), None
        return self.core.on_attention(step, routing.topk_ids, routing.topk_weights, at, routing.scores), None

    def run_head(self, step) -> None:
        assert self.answers.is_for(step)
        self.core.on_head(step, *self.answers.sample(step, 0.0))


CAPACITIES = (
    CapacityConfig(factor=1.0, phase="both"),
    CapacityConfig(factor=1.0, mode="reroute", scope="device", phase="both", keep_best=False),
    CapacityConfig(factor=1.0, mode="expanded", exceed_top_k=True, phase="prefill"),
    CapacityConfig(slack_s=1e-6, phase="both"),
    CapacityConfig(slack_s=1e-6, mode="reroute", phase="both"),
)


@pytest.mark.parametrize("capacity", CAPACITIES, ids=lambda item: f"{item.mode}-{item.factor or item.slack_s}")
@pytest.mark.parametrize("schedule", ["progress", "waves"])
def test_capacity_is_replayed_too(schedule, capacity, tmp_path):
    config = make_config(
        routing=log_normal_routing(SIZES, 1.0, seed=1),
        workload=Workload(concurrency=7, num_requests=15, input=Lengths(mean=20), output=Lengths(mean=8)),
        placement=PLACEMENTS["colocated2"],
        scheduler=SchedulerConfig(schedule=schedule, max_num_seqs=5, max_num_batched_tokens=24),
        capacity=capacity,
    )
    simulator = Simulator(config)
    traces = [record(core, config.engine_config(), config.shape, config.owners) for core in simulator.cores]
    assert simulator.run().output_tokens == 15 * 8
    assert sum(core.attention.capacity.ledger.lost.sum() for core in simulator.cores) > 0
    for trace in traces:
        save_trace(trace, tmp_path / "trace")
        assert load_trace(tmp_path / "trace") == trace
        assert replay(trace) is None


@pytest.mark.parametrize(("placement", "num_redundant"), [("colocated2", 0), ("colocated2", 2), ("1A1E", 0)])
@pytest.mark.parametrize(("schedule", "micro_batches"), SCHEDULES)
def test_the_engine_decides_as_the_simulator_did(placement, schedule, micro_batches, num_redundant):
    config = make_config(
        routing=log_normal_routing(SIZES, 1.0, seed=1),
        workload=Workload(concurrency=7, num_requests=15, input=Lengths(mean=20), output=Lengths(mean=8)),
        placement=PLACEMENTS[placement],
        cache=CacheConfig(block_size=4, num_blocks=25, enable_prefix_caching=False),
        scheduler=SchedulerConfig(
            schedule=schedule, micro_batches=micro_batches, max_num_seqs=5, max_num_batched_tokens=24
        ),
    )
    if num_redundant:
        config = with_replicas(config, num_redundant, config.routing.popularity(), "even")
    simulator = Simulator(config)
    traces = [record(core, config.engine_config(), config.shape, config.owners) for core in simulator.cores]
    assert simulator.run().output_tokens == 15 * 8
    for trace in traces:
        assert len(trace.entries) > 200
        assert replay(trace) is None
        assert replay(trace, EngineShell) is None

"""A virtual cluster: one `WorkerCore` per rank over the model of integers, and an adversary who delivers the batches.

No process, no thread, no tensor. What the engine keeps (residuals, partials, slab, KV cache) is kept here in the same
layout and indexed by the same numbers, so that a wrong number is a wrong token. Delivered batches are overwritten after
use, as a transport may do.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, field, replace

import numpy as np

from amoe.clock import ManualClock
from amoe.config import CacheConfig, CapacityConfig, EngineConfig, PlacementConfig, SchedulerConfig
from amoe.core.steps import AttentionStep, ExpertsStep, HeadStep
from amoe.core.worker import ModelShape, WorkerCore
from amoe.policy.placement import place_experts, replicate_experts
from amoe.types import Batch, BatchKind, SamplingParams
from tests.unit.core import fake_model
from tests.unit.core.fake_model import ModelSpec, Oracle

PATIENT = 1e9  # seconds that no run lasts: whoever waits so long waits for ever
COLUMNS = ("slots", "generations", "iterations", "expert_ids", "expert_weights")


@dataclass(frozen=True)
class Request:
    """One request of a scenario; `arrive` and `abort` are turns of the adversary.

    Attributes:
        exact: its tokens must be the oracle's. Others may lose pairs where the scenario has a capacity.
        scored: the log-probabilities of its prompt are wanted.
    """

    request_id: int
    home: int
    prompt: tuple[int, ...]
    max_tokens: int
    arrive: int = 0
    abort: int | None = None
    exact: bool = True
    scored: bool = False

    @property
    def params(self) -> SamplingParams:
        spans = () if self.exact or len(self.prompt) < 3 else ((1, 3),)
        choice = "exact" if self.exact else "best_effort"
        return SamplingParams(
            max_tokens=self.max_tokens,
            prompt_logprobs=0 if self.scored else None,
            capacity=choice,
            droppable_spans=spans,
        )


@dataclass(frozen=True)
class Scenario:
    """All that a run depends on: the same scenario gives the same run.

    Attributes:
        spare_blocks: KV blocks beyond those that the longest request needs.
        duplicates: share of DISPATCH and RESULT batches between workers that are delivered twice.
        restless: the number of waves changes after every iteration.
        spare_slots: experts of each layer that an expert worker holds as replicas.
        fickle: the shares of the replicas change at any time, and each home has its own.
        stopped: (rank, turn) of a worker that stops as a process does.
        resumes: turn at which it goes on; None: when nothing else moves any more.
        capacity: what may be taken from requests that are not exact.
    """

    requests: tuple[Request, ...]
    spec: ModelSpec = field(default_factory=lambda: ModelSpec((True, True), 2, (0,) * 4))
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    cache: CacheConfig = field(default_factory=lambda: CacheConfig(block_size=4))
    spare_blocks: int = 100
    duplicates: float = 0.0
    restless: bool = False
    spare_slots: int = 0
    fickle: bool = False
    stopped: tuple[int, int] | None = None
    resumes: int | None = None
    capacity: CapacityConfig = field(default_factory=CapacityConfig)
    seed: int = 0

    @property
    def max_model_len(self) -> int:
        return max(len(request.prompt) + request.max_tokens for request in self.requests)

    @property
    def num_blocks(self) -> int:
        return -(-self.max_model_len // self.cache.block_size) + self.spare_blocks

    def owners(self):
        """[L, E, R] where experts and replicas live: replicas of the experts to which the router leans."""
        num_owners, num_experts = len(self.placement.expert_ranks), self.spec.num_experts
        if self.spare_slots == 0:
            return place_experts(self.spec.num_layers, num_experts, num_owners)
        load = np.tile(np.asarray(self.spec.bias, np.float64) + 1, (self.spec.num_layers, 1))
        return replicate_experts(load, num_owners, -(-num_experts // num_owners) + self.spare_slots)


def random_shares(owners, rng):
    """[L, E, R]: all at one replica, at some, or at all of them, by halves and by odd numbers."""
    exists = owners >= 0
    shares = np.where(exists, rng.choice([0.0, 0.0, 1.0, 1.0, 0.1, rng.random()], owners.shape), 0.0)
    shares[..., 0] += shares.sum(axis=-1) == 0
    return shares / shares.sum(axis=-1, keepdims=True)


class RestlessWaves:
    """A `WaveController` without a reason."""

    def __init__(self, max_waves: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.max_waves = max_waves
        self.num_waves = self.random.randint(1, max_waves)

    def observe(self, tokens: int, now: float) -> None:
        assert tokens >= 0  # 0: prompts alone
        self.num_waves = self.random.randint(1, self.max_waves)


class VirtualWorker:
    """What the engine's worker does around a `WorkerCore`, in the fewest words."""

    def __init__(self, scenario: Scenario, rank: int, oracles: dict[int, Oracle]) -> None:
        placement, slots = scenario.placement, scenario.scheduler.num_token_slots
        spec, blocks = scenario.spec, scenario.num_blocks
        config = EngineConfig(
            model="fake",
            placement=placement,
            scheduler=scenario.scheduler,
            cache=scenario.cache,
            capacity=scenario.capacity,
            max_waiting=0,
        )
        shape = ModelShape(spec.sparse_layers, spec.num_experts)
        length = scenario.max_model_len
        waves = RestlessWaves(config.scheduler.max_waves, scenario.seed) if scenario.restless else None
        self.owners = scenario.owners()
        self.core = WorkerCore(
            config,
            shape,
            rank,
            num_kv_blocks=blocks,
            max_model_len=length,
            wave_controller=waves,
            owners=self.owners if scenario.spare_slots else None,
        )
        self.spec, self.rank, self.oracles = spec, rank, oracles
        self.max_tokens = {request.request_id: request.max_tokens for request in scenario.requests}
        self.unchecked = {r.request_id for r in scenario.requests if not r.exact and scenario.capacity.is_on}
        self.owner_of_rank = {owner: index for index, owner in enumerate(placement.expert_ranks)}
        self.block_size = scenario.cache.block_size
        self.keys = np.zeros((spec.num_layers, blocks * self.block_size), np.uint64)
        self.residual = np.zeros(slots, np.uint64)
        self.partials = np.zeros((len(placement.expert_ranks), slots), np.uint64)
        self.slab = np.zeros(len(placement.attention_ranks) * slots, np.uint64)
        self.streamed: dict[int, list[int]] = {}
        self.scored: dict[int, list[int]] = {}  # positions of the prompt that the head has seen, by request
        self.terminal: Counter[int] = Counter()
        self.sampling: dict[int, int] = {}  # request by row, as the engine keeps the sampling parameters

    @property
    def batcher(self):
        return self.core.attention.batcher

    def add(self, request: Request) -> None:
        self.streamed[request.request_id] = []
        self.scored[request.request_id] = []
        self.batcher.add(request.request_id, np.asarray(request.prompt, np.int32), request.params)

    def abort(self, request_id: int) -> None:
        if self.batcher.abort(request_id) is not None:
            self.terminal[request_id] += 1
        assert self.terminal[request_id] == 1, "neither aborted nor finished before"

    def receive(self, batch: Batch, now: float) -> None:
        kept = self.core.on_batch(batch, now)
        if kept is None or batch.payload is None:
            return
        if batch.kind is BatchKind.DISPATCH:
            self.slab[self.core.experts.slab_rows(batch)[kept]] = batch.payload[kept]
        else:
            self.partials[self.owner_of_rank[batch.src], batch.slots[kept]] = batch.payload[kept]

    def run(self, step: AttentionStep | HeadStep | ExpertsStep, now: float) -> list[Batch]:
        """Run a step and tell the core. Returns what is to be sent."""
        if isinstance(step, ExpertsStep):
            inputs = self.slab[step.slab_rows]
            held = (self.owners[step.block.layer] == self.owner_of_rank[self.rank]).any(axis=-1)
            assert held[step.expert_ids[step.expert_ids >= 0]].all(), "the expert does not live here"
            output = fake_model.run_experts(inputs, step.block.layer, step.expert_ids, step.expert_weights)
            return [self._packed(reply, output) for reply in step.replies]
        if isinstance(step, HeadStep):
            self._score(step)
            self._run_head(step)
            return []
        hidden = self._combined(step.block.layer, step.slots, step.rows, step.positions)
        layer = step.block.layer
        residual = fake_model.mix(hidden, self._attend(step, hidden))
        if not self.spec.sparse_layers[layer]:
            self.residual[step.slots] = fake_model.mix(residual, fake_model.DENSE)
            return [self._packed(out, None) for out in self.core.attention.on_attention(step, None, None, now)]
        self.residual[step.slots] = residual
        moe_input = fake_model.mix(residual, fake_model.NORM)
        topk_ids, topk_weights = fake_model.route(moe_input, layer, self.spec)
        scores = fake_model.scores(moe_input, layer, self.spec)
        outgoing = self.core.attention.on_attention(step, topk_ids, topk_weights, now, scores)
        return [self._packed(out, moe_input) for out in outgoing]

    def _combined(self, layer, slots, rows=None, positions=None):
        """Hidden states [n] that enter a block: embeddings, or residuals with what the experts have said."""
        if layer == 0:
            return fake_model.embed(self.batcher.table.tokens[rows, positions], positions)
        if not self.spec.sparse_layers[layer - 1]:
            return self.residual[slots]
        answered = self.batcher.join.dispatched[slots].T
        total = np.where(answered, self.partials[:, slots], np.uint64(0)).sum(axis=0, dtype=np.uint64)
        return fake_model.mix(self.residual[slots], total)

    def _attend(self, step: AttentionStep, hidden):
        """Sums [n] over the KV entries up to each token; every entry is compared with the oracle's."""
        layer = step.block.layer
        spans = [(i, i + 1, int(row)) for i, row in enumerate(step.rows[: step.num_decodes])]
        spans += [(span.start, span.end, span.row) for span in step.chunks]
        assert [row for start, end, row in spans for _ in range(start, end)] == step.rows.tolist()
        sums = np.zeros(step.num_tokens, np.uint64)
        for start, end, row in spans:
            positions = step.positions[start:end].tolist()
            assert positions == list(range(positions[0], positions[-1] + 1))
            upto = positions[-1] + 1
            where = np.arange(upto)
            places = self.batcher.table.block_table[row, where // self.block_size] * self.block_size
            places = places + where % self.block_size
            sequence = self.batcher.table.sequences[row]
            written = set((places[positions[0] :] // self.block_size).tolist())
            for other in self.batcher.running.values():
                assert other is sequence or written.isdisjoint(other.blocks), "a shared block is written to"
            self.keys[layer, places[positions[0] :]] = fake_model.key(hidden[start:end], layer)
            oracle = self.oracles[sequence.request_id]
            if sequence.request_id not in self.unchecked:
                known = oracle.keys[layer][:upto]
                assert self.keys[layer, places].tolist() == known, "somebody else's KV, or a wrong one"
            sums[start:end] = self.keys[layer, places].cumsum(dtype=np.uint64)[positions[0] :]
        return sums

    def _score(self, step: HeadStep) -> None:
        """Every prompt token but the last comes once, in order, and before anything is sampled."""
        if step.prompt is None:
            return
        hidden = self._combined(step.block.layer, step.prompt.slots)
        places = zip(step.prompt.rows.tolist(), step.prompt.positions.tolist(), hidden.tolist(), strict=True)
        for row, position, value in places:
            sequence = self.batcher.table.sequences[row]
            assert sequence.params.prompt_logprobs is not None, "nobody has asked"
            assert len(self.scored[sequence.request_id]) == position < sequence.prompt_len - 1
            self.scored[sequence.request_id].append(position)
            if sequence.request_id not in self.unchecked:
                assert value == self.oracles[sequence.request_id].hidden[position], "a wrong hidden state"

    def _run_head(self, step: HeadStep) -> None:
        self.sampling |= {s.row: s.request_id for s in self.batcher.take_admitted() if s.row >= 0}
        token_ids = fake_model.sample(self._combined(step.block.layer, step.slots), self.spec)
        finished = np.zeros(len(step.slots), np.bool_)
        for index, row in enumerate(step.rows.tolist()):
            sequence = self.batcher.table.sequences[row]
            assert self.sampling[row] == sequence.request_id, "sampled with somebody else's parameters"
            if sequence.params.prompt_logprobs is not None:
                assert len(self.scored[sequence.request_id]) == sequence.prompt_len - 1, "sampled before it was scored"
            streamed = self.streamed[sequence.request_id]
            streamed.append(int(token_ids[index]))
            if sequence.request_id in self.unchecked:
                is_last = len(streamed) == self.max_tokens[sequence.request_id]
            else:
                generated = self.oracles[sequence.request_id].generated
                assert streamed == generated[: len(streamed)], f"request {sequence.request_id} got wrong tokens"
                is_last = len(streamed) == len(generated)
            if is_last:
                finished[index] = True
                self.terminal[sequence.request_id] += 1
        self.core.attention.on_head(step, token_ids, finished)

    def _packed(self, outgoing, output) -> Batch:
        """A copy that shares no memory with the core, with its payload."""
        batch = outgoing.batch
        columns = {name: getattr(batch, name).copy() for name in COLUMNS}
        assert batch.kind is BatchKind.ANNOUNCE or batch.count == len(batch.slots)
        packed = replace(batch, **columns)
        if outgoing.rows is not None and batch.count:
            packed.payload = output[outgoing.rows].copy()
            assert len(packed.payload) == batch.count
        return packed


class Cluster:
    """Runs a scenario to its end: batches of a pair of workers keep their order, and nothing else does."""

    MAX_TURNS = 200_000

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.random = random.Random(scenario.seed)
        self.rng = np.random.default_rng(scenario.seed)
        self.clock = ManualClock()
        self.oracles = {r.request_id: Oracle(scenario.spec, list(r.prompt), r.max_tokens) for r in scenario.requests}
        ranks = range(scenario.placement.num_workers)
        self.workers = [VirtualWorker(scenario, rank, self.oracles) for rank in ranks]
        self.homes = [self.workers[rank] for rank in scenario.placement.attention_ranks]
        self.bag: dict[tuple[int, int], deque[Batch]] = {(a, b): deque() for a in ranks for b in ranks}
        self.events = [(r.arrive, 0, r) for r in scenario.requests]
        self.events += [(max(r.arrive, r.abort), 1, r) for r in scenario.requests if r.abort is not None]
        if scenario.stopped is not None:
            self.events.append((scenario.stopped[1], 2, None))
            if scenario.resumes is not None:
                self.events.append((scenario.resumes, 3, None))
        self.events.sort(key=lambda event: event[:2], reverse=True)
        self.awake: set[int] = set()  # a worker that finds nothing to do sleeps until something comes
        self.stopped: int | None = None  # rank of the worker that does not move now
        self.turns = 0
        self.steps = 0
        self._weights: dict[object, float] = {}

    def home_of(self, request: Request) -> VirtualWorker:
        return self.homes[request.home % len(self.homes)]

    def run(self) -> None:
        """Until every request has ended and nothing is on its way."""
        while True:
            self.turns += 1
            assert self.turns < self.MAX_TURNS, "the cluster runs for ever"
            self.clock.advance(self.random.random() * 1e-3)
            while self.events and self.events[-1][0] <= self.turns:
                self._happen()
            if self.turns % 40 == 1:  # now and then other ones become slow
                self._weights = {
                    key: self.random.random() ** 3 + 0.01 for key in (*self.bag, *range(len(self.workers)))
                }
            if self.scenario.fickle and self.random.random() < 0.1:
                home = self.random.choice(self.homes)
                home.core.attention.set_shares(random_shares(home.owners, self.rng))
            choices = self.choices()
            if not choices:
                if not self.idle():
                    return
                continue
            choice = self.random.choices(choices, [self._weights[key] for key in choices])[0]
            if isinstance(choice, tuple):
                self.deliver(choice)
            elif not self.turn(self.workers[choice]):
                self.awake.remove(choice)
            if self.turns % 32 == 0:
                self.check()

    def choices(self) -> list[tuple[int, int] | int]:
        """What can happen: a pair of workers between which a batch is on its way, or a worker that is awake."""
        for worker in self.workers:
            deadline = worker.core.next_deadline(self.clock.now())
            if deadline is not None and deadline <= self.clock.now():
                self.awake.add(worker.rank)
        pairs = [pair for pair, batches in self.bag.items() if batches and pair[1] != self.stopped]
        return pairs + sorted(self.awake - {self.stopped})

    def idle(self) -> bool:
        """Nothing can happen now: time passes until the next timer, the next event, or the end of a standstill."""
        deadlines = [w.core.next_deadline(self.clock.now()) for w in self.workers if w.rank != self.stopped]
        deadline = min((d for d in deadlines if d is not None), default=None)
        if deadline is not None:
            self.clock.advance(max(0.0, deadline - self.clock.now()))
            assert self.choices(), "a timer that wakes nobody"
        elif self.events:
            self.turns = max(self.turns, self.events[-1][0] - 1)
        elif self.stopped is not None:
            self.at_standstill()
            self.awake.add(self.stopped)
            self.stopped = None
        else:
            return False
        return True

    def at_standstill(self) -> None:
        """Nothing moves any more while a worker has stopped."""

    def _happen(self) -> None:
        _, kind, request = self.events.pop()
        if request is None:
            rank = self.scenario.stopped[0]
            self.stopped = rank if kind == 2 else None
            self.awake.add(rank)
            return
        self.awake.add(self.home_of(request).rank)
        if kind == 1:
            self.home_of(request).abort(request.request_id)
        else:
            self.home_of(request).add(request)

    def send(self, batch: Batch) -> None:
        self.bag[batch.src, batch.dst].append(batch)
        twice = batch.kind is not BatchKind.ANNOUNCE and batch.src != batch.dst
        if twice and self.random.random() < self.scenario.duplicates:
            columns = {name: getattr(batch, name).copy() for name in COLUMNS}
            payload = None if batch.payload is None else batch.payload.copy()
            self.bag[batch.src, batch.dst].append(replace(batch, payload=payload, **columns))

    def deliver(self, pair: tuple[int, int]) -> None:
        batch = self.bag[pair].popleft()
        self.awake.add(batch.dst)
        self.workers[batch.dst].receive(batch, self.clock.now())
        for array in (*(getattr(batch, name) for name in COLUMNS), batch.payload):
            if array is not None:
                array.fill(99)  # the transport takes its memory back

    def turn(self, worker: VirtualWorker) -> bool:
        """One turn of a worker's loop. Returns whether it did anything."""
        before = worker.core.attention and worker.batcher.slots.num_free
        announcements = worker.core.start(self.clock.now())
        for outgoing in announcements:
            self.send(worker._packed(outgoing, None))
        started = bool(announcements) or before != (worker.core.attention and worker.batcher.slots.num_free)
        step = worker.core.next_step(self.clock.now())
        if step is None:
            return started
        self.steps += 1
        for batch in worker.run(step, self.clock.now()):
            self.send(batch)
        slowness = 1 + 9 * (worker.rank % 2)
        worker.core.observe(step, slowness * 1e-3 * (1 + step.num_tokens))
        return True

    # ---- what must hold

    def check(self) -> None:
        """At any time."""
        for worker in self.homes:
            batcher = worker.batcher
            batcher.blocks.check()
            held = Counter(block for sequence in batcher.running.values() for block in sequence.blocks)
            assert batcher.blocks.num_used == len(held), "a KV block is leaked"
            in_flight = sum(len(sequence.slots) for sequence in batcher.running.values())
            assert batcher.slots.num_free + in_flight == batcher.slots.num_slots, "a token slot is leaked"
            assert batcher.table.num_free_rows + len(batcher.running) == len(batcher.table.sequences)
            arrivals = [sequence.arrival for sequence in batcher.waiting]
            assert arrivals == sorted(arrivals)
            if arrivals and batcher.running:
                assert max(s.arrival for s in batcher.running.values()) < arrivals[0], "somebody was overtaken"

            if self.scenario.scheduler.schedule == "waves":
                self.check_waves(worker)

    def check_waves(self, worker: VirtualWorker) -> None:
        """What is in flight of a wave at a home stands at one place; counters equal contents."""
        core, batcher = worker.core, worker.batcher
        join, lanes = batcher.join, self.scenario.scheduler.num_lanes
        depth = core.queues.depth.reshape(lanes, -1)[:-1, ::2]
        live = np.zeros(batcher.slots.num_slots, np.bool_)
        for sequence in batcher.running.values():
            live[sequence.slots] = True
        assert not join._awaiting[~live].any()
        assert join.outstanding.tolist() == [int(join._awaiting[join.lane == lane].sum()) for lane in range(lanes)]
        assert ((depth > 0).sum(axis=1) <= 1).all(), "a wave is at two places"

    def check_end(self) -> None:
        """After `run`: every request has one end, the oracle's tokens, and has left nothing behind."""
        aborted = {request.request_id for request in self.scenario.requests if request.abort is not None}
        for request in self.scenario.requests:
            worker, generated = self.home_of(request), self.oracles[request.request_id].generated
            assert worker.terminal[request.request_id] == 1, f"request {request.request_id} has not one end"
            streamed = worker.streamed[request.request_id]
            if request.request_id in worker.unchecked:
                generated = streamed if len(streamed) == request.max_tokens else []
            assert streamed == generated or request.request_id in aborted, f"request {request.request_id} stopped early"
        self.check()
        for worker in self.homes:
            batcher = worker.batcher
            assert not batcher.waiting
            assert not batcher.running
            assert not batcher.members
            assert batcher.num_ready == 0
            assert batcher.slots.num_free == batcher.slots.num_slots
            assert batcher.blocks.num_used == 0
            assert not batcher.join._awaiting.any()
            assert not batcher.join._pending.any()
            assert batcher._prefill_in_flight == 0
        if self.scenario.scheduler.max_hold_s == PATIENT and self.scenario.stopped is None:
            assert [worker.core.num_slips for worker in self.workers] == [0] * len(self.workers)
        for worker in self.workers:
            # In lockstep the copy of a dispatch waits, harmless, for the next epoch.
            if self.scenario.duplicates == 0 or self.scenario.scheduler.schedule != "lockstep":
                assert not worker.core.queues.depth.any()


def run_scenario(scenario: Scenario) -> Cluster:
    """Run to the end and check everything."""
    cluster = Cluster(scenario)
    cluster.run()
    cluster.check_end()
    return cluster

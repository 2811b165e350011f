"""A virtual cluster: one `WorkerCore` per rank over the model of integers, and an adversary who delivers the batches.

Delivered batches are overwritten after use, as a transport may do.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import replace

import numpy as np

from amoe.clock import ManualClock
from amoe.core.steps import ForwardStep
from amoe.types import Batch, BatchKind
from tests.unit.core.fake_model import Oracle
from tests.unit.core.scenario import PATIENT, Request, Scenario, random_shares
from tests.unit.core.virtual_worker import COLUMNS, VirtualWorker


class Cluster:
    """Runs a scenario to its end: batches of a pair of workers keep their order, and nothing else does."""

    MAX_TURNS = 200_000

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.random = random.Random(scenario.seed)
        self.rng = np.random.default_rng(scenario.seed)
        self.clock = ManualClock()
        self.oracles = {r.request_id: Oracle(scenario.spec, list(r.prompt), r.max_tokens) for r in scenario.requests}
        placement = scenario.placement
        ranks = range(placement.num_ranks)
        # None: nobody is there.
        self.workers = [
            VirtualWorker(scenario, rank, self.oracles) if rank < placement.num_workers else None for rank in ranks
        ]
        self.homes = [self.workers[rank] for rank in scenario.placement.attention_ranks]
        self.bag: dict[tuple[int, int], deque[Batch]] = {(a, b): deque() for a in ranks for b in ranks}
        self.events = [(r.arrive, 0, r) for r in scenario.requests]
        self.events += [(max(r.arrive, r.abort), 1, r) for r in scenario.requests if r.abort is not None]
        if scenario.stopped is not None:
            self.events.append((scenario.stopped[1], 2, None))
            if scenario.resumes is not None:
                self.events.append((scenario.resumes, 3, None))
        numbers = {id(request): request.request_id for request in scenario.requests}  # siblings come behind the first
        self.events.sort(key=lambda event: (*event[:2], numbers.get(id(event[2]), -1)), reverse=True)
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
        for worker in filter(None, self.workers):
            deadline = worker.core.next_deadline(self.clock.now())
            if deadline is not None and deadline <= self.clock.now():
                self.awake.add(worker.rank)
        pairs = [pair for pair, batches in self.bag.items() if batches and pair[1] != self.stopped]
        return pairs + sorted(self.awake - {self.stopped})

    def idle(self) -> bool:
        """Nothing can happen now: time passes until the next timer, the next event, or the end of a standstill."""
        moving = [worker for worker in self.workers if worker is not None and worker.rank != self.stopped]
        deadlines = [worker.core.next_deadline(self.clock.now()) for worker in moving]
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
        members = self.workers[batch.src].core.members
        if not members.has(batch.dst):
            return
        members.stamp(batch)
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
        before = worker.batcher and worker.batcher.slots.num_free
        announcements = worker.core.start(self.clock.now())
        for outgoing in announcements:
            self.send(worker._packed(outgoing, None))
        started = bool(announcements) or before != (worker.batcher and worker.batcher.slots.num_free)
        step = worker.core.next_step(self.clock.now())
        if step is None:
            return started
        self.steps += 1
        for batch in worker.run(step, self.clock.now()):
            self.send(batch)
        slowness = 1 + 9 * (worker.rank % 2)
        if not isinstance(step, ForwardStep):
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
            orders = [sequence.order for sequence in batcher.waiting]
            assert orders == sorted(orders)
            if orders and batcher.running and self.scenario.admits_in_order:
                assert max(s.order for s in batcher.running.values()) < orders[0], "somebody was overtaken"
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
            assert not any(worker.core.num_slips for worker in filter(None, self.workers))
        for worker in filter(None, self.workers):
            # In lockstep the copy of a dispatch waits, harmless, for the next epoch.
            if self.scenario.duplicates == 0 or self.scenario.scheduler.schedule != "lockstep":
                assert not worker.core.queues.depth.any()


def run_scenario(scenario: Scenario) -> Cluster:
    """Run to the end and check everything."""
    cluster = Cluster(scenario)
    cluster.run()
    cluster.check_end()
    return cluster

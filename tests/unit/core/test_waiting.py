"""No token waits longer than max_wait_s + B·t in the μ-queues of a worker with B blocks and steps of at most t."""

from __future__ import annotations

import heapq
import random
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoe.config import SchedulerConfig
from amoe.core.micro_queue import MicroQueues
from amoe.policy.scheduler import choose_block, make_policy, num_stages
from tests.unit.core.examples import clusters, examples
from tests.unit.core.harness import Cluster
from tests.unit.core.scenarios import WAVES, scenarios

ASYNC = ("fcfs", "flfs", "mtfs", "defrag", "progress")
STEP = 0.01  # t, seconds
ROUNDING = 1e-9


@pytest.mark.parametrize("schedule", ASYNC)
@examples(30)
@given(
    num_layers=st.integers(1, 4),
    max_wait=st.sampled_from([0.005, 0.05, 0.2]),
    favourites=st.lists(st.integers(0, 8), min_size=1, max_size=3),
    seed=st.integers(0, 2**32),
)
def test_a_stream_of_better_tokens_starves_nobody(schedule, num_layers, max_wait, favourites, seed):
    """An adversary keeps some queues full with tokens of little progress; few others come, and must be served."""
    rng = random.Random(seed)
    queues = MicroQueues(num_layers, 1)
    policy = make_policy(SchedulerConfig(schedule=schedule), num_layers)
    bound = max_wait + num_stages(num_layers) * STEP + ROUNDING
    now = 0.0
    for turn in range(200):
        pushes = [(favourite % num_stages(num_layers), 50, 0) for favourite in favourites]
        if rng.random() < 0.2:
            pushes.append((rng.randrange(num_stages(num_layers)), 1, turn + 1000))
        for index, tokens, iteration in pushes:
            came = np.full(tokens, now)
            queues.push(queues.block(index), (came,), np.full(tokens, iteration, np.int32), now)
        chosen = choose_block(policy, queues.view(), now, max_wait)
        assert chosen is not None, "some queue is not empty"
        (came,) = queues.drain(chosen)
        assert now - came.min() <= bound
        now += rng.choice([STEP, rng.random() * STEP])
    waiting = queues.view().oldest
    assert now - waiting.min() <= bound


class TimedCluster(Cluster):
    """The same cluster on a time axis: steps and deliveries take time, and each worker's loop turns when it is free."""

    def __init__(self, scenario, max_wait):
        super().__init__(scenario)
        scheduler = scenario.scheduler
        self.bound = max_wait + scheduler.num_lanes * num_stages(scenario.spec.num_layers) * STEP + ROUNDING
        self.hold = scheduler.max_hold_s if scheduler.schedule == "waves" else 0.0
        self.bound += self.hold
        self.due: dict[tuple[int, int], deque[float]] = {}
        for worker in self.workers:
            self.watch(worker.core.queues)

    def watch(self, queues):
        """Check the age of all that is drained."""
        came: dict[int, list[float]] = {}
        push, drain, move = queues.push, queues.drain, queues.move

        def watched_push(block, columns, iterations, now):
            if len(iterations):
                came.setdefault(queues.index(block), []).append(now)
            push(block, columns, iterations, now)

        def watched_drain(index):
            waited = self.clock.now() - min(came.pop(index, [self.clock.now()]))
            assert waited <= self.bound, f"a token has waited {waited} s"
            return drain(index)

        def watched_move(source, target):
            came.setdefault(target, []).extend(came.pop(source, []))
            move(source, target)

        queues.push, queues.drain, queues.move = watched_push, watched_drain, watched_move

    def send(self, batch):
        pair = batch.src, batch.dst
        before = len(self.bag[pair])
        super().send(batch)
        times = self.due.setdefault(pair, deque())
        for _ in range(len(self.bag[pair]) - before):
            arrival = self.clock.now() + self.random.random() * 2 * STEP
            times.append(max(arrival, times[-1] if times else 0.0))

    def poll(self, worker):
        for pair, times in self.due.items():
            while pair[1] == worker.rank and times and times[0] <= self.clock.now():
                times.popleft()
                self.deliver(pair)

    def run(self):
        """Until nothing has happened for a while."""
        turns = [(0.0, worker.rank) for worker in self.workers]
        busy_until = 0.0
        while self.events or turns[0][0] <= busy_until + 4 * STEP + self.hold:
            now, rank = heapq.heappop(turns)
            self.clock.advance(now - self.clock.now())
            while self.events and self.events[-1][0] * STEP / 10 <= now:
                self._happen()
                busy_until = now
            worker = self.workers[rank]
            self.poll(worker)
            for outgoing in worker.core.start(now):
                self.send(worker._packed(outgoing, None))
            step = worker.core.next_step(now)
            took = self.random.choice([STEP, self.random.random() * STEP])
            if step is not None:
                for batch in worker.run(step, now + took):
                    self.send(batch)
                busy_until = now + took
            heapq.heappush(turns, (now + took, rank))


@clusters(25)
@given(
    scenarios(schedules=[*((name, 1) for name in ASYNC), *WAVES], max_requests=6, max_prompt=20, aborts=True),
    st.sampled_from([0.001, 0.02]),
)
def test_no_token_of_a_cluster_waits_longer_than_the_bound(scenario, max_wait):
    scheduler = replace(scenario.scheduler, max_wait_s=max_wait, max_hold_s=5 * max_wait)
    cluster = TimedCluster(replace(scenario, scheduler=scheduler), max_wait)
    cluster.run()
    cluster.check_end()

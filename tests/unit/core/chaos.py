"""A virtual cluster that loses and gains workers, moves its experts about, and loses batches on their way.

What the server does about it is played here in the fewest words: it gives the dead a successor, says to everybody who
is there (rosters, which reach each worker at any time later, but in order), and sends the sequences of a dead home to
another one with what they have streamed so far.

Faults, `(turn, what, number)`:
    kill     the worker of that rank dies with all that it has; what it has sent may still arrive
    start    a successor comes, or the first worker of a spare rank
    replace  both at once, with all that is on its way between it and the others
    move     experts are placed anew, by that seed, over the workers that are there
"""

from __future__ import annotations

from collections import deque

import numpy as np

from amoe.core.members import NOBODY, Roster
from amoe.types import Batch, BatchKind
from tests.unit.core.harness import Cluster
from tests.unit.core.scenario import Request, Scenario
from tests.unit.core.virtual_worker import VirtualWorker

_FAULT = 9


class ChaosCluster(Cluster):
    """Runs a scenario with faults to its end, see above."""

    MAX_TURNS = 400_000

    def __init__(self, scenario: Scenario) -> None:
        super().__init__(scenario)
        self.placement = scenario.placement
        self.version = 0
        self.incarnations = [0 if worker else NOBODY for worker in self.workers]
        self.lives = list(self.incarnations)  # of the last worker at each rank
        self.owners = scenario.owners()
        self.inbox: dict[int, deque[Roster]] = {rank: deque() for rank in range(len(self.workers))}
        self.applied = [0] * len(self.workers)
        self.moving: tuple[int, np.ndarray] | None = None  # version that has to be applied, table that is left then
        self.place_of = {request.request_id: self.home_rank(request) for request in scenario.requests}
        self.orphans: list[Request] = []
        self.streamed: dict[int, list[int]] = {}
        self.ends = dict.fromkeys(self.place_of, 0)
        self.num_lost = 0
        self.events += [(turn, _FAULT, (what, number)) for turn, what, number in scenario.faults]
        self.events.sort(key=lambda event: event[:2], reverse=True)  # stable: equals stay as they were

    def home_rank(self, request: Request) -> int:
        homes = self.placement.attention_ranks
        return homes[request.home % len(homes)]

    # ---- what the server does

    def tell(self) -> None:
        self.version += 1
        for rank, worker in enumerate(self.workers):
            if worker is not None:
                self.inbox[rank].append(self.roster())

    def roster(self) -> Roster:
        return Roster(self.version, tuple(self.incarnations), self.owners.copy())

    def _happen(self) -> None:
        _, kind, request = self.events[-1]
        if kind == _FAULT:
            self.events.pop()
            getattr(self, request[0])(request[1])
        elif kind in (0, 1):
            self.events.pop()
            self.add(request) if kind == 0 else self.abort(request)
        else:
            super()._happen()

    def add(self, request: Request) -> None:
        rank = self.live_home(self.place_of[request.request_id])
        if rank is None:
            self.orphans.append(request)
            return
        self.place_of[request.request_id] = rank
        self.awake.add(rank)
        self.workers[rank].add(request)

    def abort(self, request: Request) -> None:
        if request in self.orphans:
            self.orphans.remove(request)
            self.ends[request.request_id] += 1
        elif not self.ends[request.request_id]:
            worker = self.workers[self.place_of[request.request_id]]
            self.awake.add(worker.rank)
            worker.abort(request.request_id)

    def live_home(self, wish: int) -> int | None:
        homes = [rank for rank in self.placement.attention_ranks if self.workers[rank] is not None]
        return wish if wish in homes else self.random.choice(homes) if homes else None

    def replace(self, rank: int) -> None:
        self.kill(rank, is_sudden=True)
        self.start(rank)

    def kill(self, rank: int, *, is_sudden: bool = False) -> None:
        worker = self.workers[rank]
        if worker is None:
            return
        self.workers[rank] = None
        self.awake.discard(rank)
        self.inbox[rank].clear()
        self.incarnations[rank] = NOBODY
        for (src, dst), batches in self.bag.items() if not is_sudden else ():
            if dst == rank and self.random.random() < 0.5:
                batches.clear()
            if src == rank:  # from some moment on nothing has got out
                for _ in range(self.random.randint(0, len(batches))):
                    batches.pop()
        self.tell()
        if rank in self.placement.attention_ranks:
            self.bury(worker)

    def bury(self, worker: VirtualWorker) -> None:
        """The sequences of a dead home go on elsewhere, those that have begun first."""
        requests = {request.request_id: request for request in self.scenario.requests}
        for request_id, streamed in worker.streamed.items():
            self.ends[request_id] += worker.terminal[request_id]
            self.streamed[request_id] = streamed
            if not self.ends[request_id] and self.place_of[request_id] == worker.rank:
                self.resume(requests[request_id], worker)

    def resume(self, request: Request, dead: VirtualWorker) -> None:
        rank = self.live_home(NOBODY)
        if rank is None:
            self.orphans.append(request)
            self.graves = dead
            return
        self.place_of[request.request_id] = rank
        self.awake.add(rank)
        self.hand_over(request, dead, self.workers[rank])

    def hand_over(self, request: Request, dead: VirtualWorker, heir: VirtualWorker) -> None:
        request_id = request.request_id
        heir.resume(request, dead.streamed[request_id], dead.scored[request_id], dead.num_routed[request_id])

    def start(self, rank: int) -> None:
        if self.workers[rank] is not None:
            return
        self.lives[rank] += 1
        worker = VirtualWorker(self.scenario, rank, self.oracles, (self.lives[rank], self.roster()))
        self.workers[rank] = worker
        self.incarnations[rank], self.applied[rank] = self.lives[rank], self.version
        self.awake.add(rank)
        self.homes = [self.workers[home] for home in self.placement.attention_ranks if self.workers[home] is not None]
        if self.moving is not None and rank in self.placement.owner_ranks:
            worker.held |= self.share_of(rank, self.moving[1])
        self.tell()
        if rank in self.placement.attention_ranks:
            orphans, self.orphans = self.orphans, []
            for request in orphans:
                self.place_of[request.request_id] = rank
                if request.request_id in self.streamed:
                    self.hand_over(request, self.graves, worker)
                else:
                    worker.add(request)

    def share_of(self, rank: int, owners: np.ndarray) -> np.ndarray:
        """[L, E] that a table gives to a worker."""
        return (owners == self.placement.owner_ranks.index(rank)).any(axis=-1)

    def move(self, seed: int) -> None:
        ranks = self.placement.owner_ranks
        there = [owner for owner, rank in enumerate(ranks) if self.workers[rank] is not None]
        if not there or self.moving is not None:
            return
        rng = np.random.default_rng(seed)
        shape = (*self.owners.shape[:2], int(rng.integers(1, len(there) + 1)))
        new = np.full(shape, -1, np.int16)
        for place in np.ndindex(shape[:2]):
            chosen = rng.permutation(there)[: rng.integers(1, shape[2] + 1)]
            new[place][: len(chosen)] = chosen
        for owner in there:
            self.workers[ranks[owner]].held |= self.share_of(ranks[owner], new)
        self.owners = new
        self.tell()
        self.moving = (self.version, new)

    def forget(self) -> None:
        """Every home routes by the new table: what it does not say may go."""
        version, owners = self.moving
        there = [rank for rank in self.placement.attention_ranks if self.workers[rank] is not None]
        if all(self.applied[rank] >= version for rank in there):
            self.moving = None
            for rank in self.placement.owner_ranks:
                if self.workers[rank] is not None:
                    self.workers[rank].held = self.share_of(rank, owners)

    # ---- what the adversary does

    def choices(self):
        told = [("told", rank) for rank, rosters in self.inbox.items() if rosters]
        for key in told:
            self._weights.setdefault(key, 0.3)
        choices = super().choices() + told
        for key in choices:
            self._weights.setdefault(key, self.random.random() ** 3 + 0.01)
        return choices

    def deliver(self, pair) -> None:
        if pair[0] == "told":
            worker = self.workers[pair[1]]
            roster = self.inbox[pair[1]].popleft()
            self.awake.add(pair[1])
            for batch in worker.apply(roster, self.clock.now()):
                self.send(batch)
            self.applied[pair[1]] = roster.version
            if self.moving is not None:
                self.forget()
        elif self.workers[pair[1]] is None:
            self.bag[pair].popleft()
        elif self.is_lost(self.bag[pair][0]):
            self.bag[pair].popleft()
            self.num_lost += 1
        else:
            super().deliver(pair)

    def is_lost(self, batch: Batch) -> bool:
        travels = batch.kind is not BatchKind.ANNOUNCE and batch.src != batch.dst
        return travels and self.random.random() < self.scenario.loss

    def idle(self) -> bool:
        if super().idle():
            return True
        if self.orphans or not any(worker.batcher.join._awaiting.any() for worker in self.live_homes()):
            return False
        self.clock.advance(self.scenario.failure.timeout_s)
        for worker in self.live_homes():
            for batch in worker.retry(self.clock.now()):
                self.send(batch)
            self.awake.add(worker.rank)
        return True

    def live_homes(self) -> list[VirtualWorker]:
        return [self.workers[rank] for rank in self.placement.attention_ranks if self.workers[rank] is not None]

    # ---- what must hold

    def check(self) -> None:
        self.homes = self.live_homes()
        super().check()

    def check_end(self) -> None:
        aborted = {request.request_id for request in self.scenario.requests if request.abort is not None}
        assert not self.orphans
        for request in self.scenario.requests:
            request_id = request.request_id
            worker = self.workers[self.place_of[request_id]]
            if worker is not None and request_id in worker.streamed:
                self.ends[request_id] += worker.terminal[request_id]
                self.streamed[request_id] = worker.streamed[request_id]
            assert self.ends[request_id] == 1, f"request {request_id} has not one end"
            if request.exact or self.scenario.failure.on_expert_loss != "reroute":
                generated = self.oracles[request_id].generated
                assert self.streamed.get(request_id, []) == generated or request_id in aborted, "stopped early"
        self.check()
        for worker in self.homes:
            batcher = worker.batcher
            assert not batcher.waiting
            assert not batcher.running
            assert batcher.slots.num_free == batcher.slots.num_slots
            assert batcher.blocks.num_used == 0
            assert not batcher.join._awaiting.any()
            assert not batcher.join._pending.any()
        for worker in filter(None, self.workers):
            assert not worker.core.queues.depth.any()

"""Real workers in one process, between which experts move: the real board and placement manager beside them.

Every worker takes its turns in random order while the manager's coroutines run in between.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from amoe.cluster.placement_manager import PlacementManager
from amoe.cluster.topology import TopologyBoard
from amoe.config import FailureConfig, PlacementConfig
from amoe.engine.assembly import Rejoin
from amoe.engine.build import build_worker
from amoe.engine.emulated_device import served_shape
from amoe.engine.messages import Applied, Holding, LayerHeld, Ready, Steer, Unanswered
from amoe.policy.placement import experts_of
from amoe.transport.inproc import InprocFabric
from tests.cluster import FakeControl, InprocCluster, _Clock
from tests.integration.exactness import Case, assert_exact, checkpoint
from tests.unit.core.scenario import random_shares

ELASTIC = PlacementConfig(attention_workers=2, expert_workers=2, max_expert_workers=4)
GONE: Any = SimpleNamespace(turn=lambda: False)


class ElasticCluster(InprocCluster):
    """An `InprocCluster` with a board, a placement manager, and places for more workers."""

    def __init__(self, case: Case, root: Path, placement: PlacementConfig) -> None:
        config = replace(
            case.config(checkpoint(root, case.arch, case.variant)),
            placement=placement,
            # Clocks that move whenever they are read are fast: nobody is late here.
            failure=FailureConfig(timeout_s=1e9),
        )
        self.mailboxes = InprocFabric(placement.num_ranks)
        super().__init__(config, fabric=self.mailboxes)
        self.case, self.root = case, root
        shape = served_shape(config)
        self.sparse = shape.sparse_layers
        self.ranks = placement.owner_ranks
        self.board = TopologyBoard(placement.num_ranks, self._owners, self.tell)
        self.load: np.ndarray | None = None
        self.manager = PlacementManager(self.board, shape, config, send=self.tell, measured_load=lambda: self.load)
        self.board.join(dict.fromkeys(range(placement.num_workers), (0, "")))
        self.rounds = 0

    def tell(self, rank: int, message: Any) -> None:
        self.controls[rank].inbox.append(message)

    def start(self, rank: int, incarnation: int = 0) -> None:
        """A worker that comes late reads what the table in force gives it, and joins."""
        control = FakeControl()
        rejoin = Rejoin(incarnation=incarnation, topology=self.board.topology)
        worker = build_worker(self.config, rank, self.fabric.endpoint(rank), control, _Clock(), rejoin)
        assert isinstance(control.outbox.pop(), Ready)
        if rank == len(self.workers):
            self.workers.append(worker)
            self.controls.append(control)
        else:
            self.controls[rank].close()
            self.workers[rank], self.controls[rank] = worker, control
        self.board.join({rank: (incarnation, "")})

    def kill(self, rank: int) -> None:
        """A worker is gone, with all that it had not read."""
        self.workers[rank] = GONE
        self.mailboxes._mailboxes[rank].clear()
        self.board.leave(rank)

    def _steer(self) -> None:
        """Random shares of the table in force."""
        rank = self._random.choice(self.config.placement.attention_ranks)
        shares = random_shares(self.board.owners, np.random.default_rng(self.num_turns))
        self.tell(rank, Steer(shares.astype("<f4").tobytes(), self.board.version))

    def _collect(self, rank: int) -> None:
        control = self.controls[rank]
        for message in control.outbox:
            if isinstance(message, Applied):
                self.board.on_applied(rank, message.version)
            elif isinstance(message, Holding):
                self.manager.orders.on_holding(rank, message)
        control.outbox = [m for m in control.outbox if not isinstance(m, Applied | Holding | LayerHeld | Unanswered)]
        super()._collect(rank)

    async def serve_while(self, action: Awaitable[None]) -> None:
        """The case's prompts again and again until `action` has ended; every answer is exact."""
        task = asyncio.ensure_future(action)
        while not task.done():
            self.requests.clear()
            ids = [self.add(prompt, self.case.params) for prompt in self.case.prompts]
            while any(self.requests[request_id].finish_reason is None for request_id in ids):
                self._steer()
                self.turn()
                await asyncio.sleep(0)
            results = [self.requests[request_id] for request_id in ids]
            logprobs = [[entry.logprob for entry in result.logprobs] for result in results]
            assert_exact(self.case, self.root, [result.token_ids for result in results], logprobs)
            self.rounds += 1
            assert self.rounds < 500, "it never ends"
        task.result()

    def check(self) -> None:
        """Everybody holds what the table says and nothing else, and nothing is under way."""
        while any(worker is not GONE and worker._loading and worker._loading.is_busy for worker in self.workers):
            self.turn()
        self.settle()
        for owner, rank in enumerate(self.ranks):
            if rank in self.board.present:
                given = experts_of(self.board.owners, owner, self.sparse)
                held = self.workers[rank]._experts.held()
                assert held == {layer: experts for layer, experts in given.items() if experts}, rank
        assert self.manager.missing == 0

    def losses(self) -> list[tuple[int, int]]:
        """(redone, resent) of the homes."""
        homes = [self.workers[rank].core.attention for rank in self.config.placement.attention_ranks]
        return [(home.recovery.losses.redone, home.recovery.losses.resent) for home in homes]

    async def drained(self, rank: int) -> None:
        """Until nobody waits for an answer of this worker."""
        owner = np.arange(len(self.ranks) + 1) == self.ranks.index(rank)
        homes = [self.workers[rank].core.attention for rank in self.config.placement.attention_ranks]
        while any(len(home.batcher.join.owed_by(owner)) for home in homes):  # noqa: ASYNC110 - there is nobody to tell
            await asyncio.sleep(0)

    def finish(self) -> None:
        self.workers = [worker for worker in self.workers if worker is not GONE]
        self.assert_nothing_left()
        self.close()


def skewed(cluster: ElasticCluster, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(0, 1.5, cluster.board.owners.shape[:2]) * 1000

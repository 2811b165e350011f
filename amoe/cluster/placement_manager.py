"""Moves experts between workers that serve: first the weights are there, then the traffic goes there, then the old
weights go.

A transition loads what is new beside what is old, waits until everybody holds it, puts the new table on the board,
waits until every home routes by it, and then lets go of what is old. So a token finds its expert whichever table its
home goes by. A worker that dies in the middle leaves the board, which ends every wait for it; then the transition is
planned again from what is true by then.

A worker may live and not get on: a thread of it waits for storage that never answers. Nobody waits for it for ever. If
it is to hold more, the transition is given up: the table is what it was, and an answer that comes late is no answer to
the order that is in force by then. If it is a home that does not change its routing, the new table stays, and what is
old is let go of after a later transition.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from amoe.cluster.orders import STANDSTILL_S, ExpertOrders, Order
from amoe.cluster.topology import NOBODY, TopologyBoard
from amoe.config import EngineConfig
from amoe.engine.emulated_device import Shape
from amoe.engine.messages import HoldExperts, Topology
from amoe.engine.planning import considerate
from amoe.errors import ConfigError
from amoe.policy import rebalance as policy
from amoe.policy.steering import says_enough
from amoe.types import BoolArray, Int16Array

logger = logging.getLogger(__name__)

Float64Array = npt.NDArray[np.float64]
Plan = Callable[[Float64Array, Int16Array, BoolArray], Int16Array]  # load, table in force, who is present [D] -> table

PATIENCE_S = 30.0  # so long a worker that ought to be there is waited for, before it is planned without it
MAX_ATTEMPTS = 5  # of one transition: it is planned again when a worker dies in the middle
MIN_GAIN = 0.1  # of the busiest workers' load, that a rebalance has to promise to be worth it, if nobody has asked


class _Move(NamedTuple):
    """What one worker is to load."""

    order: Order
    num_experts: int
    num_layers: int

    @property
    def num_done(self) -> int:
        """Experts that it has loaded, as far as is known."""
        if self.order.answer.done():
            return self.num_experts
        return self.num_experts * min(self.order.num_layers_held, self.num_layers) // self.num_layers


class PlacementManager:
    """Who holds which experts, in one cluster. One transition at a time; the next one waits.

    Args:
        board: what is true; every change of the table goes through it.
        shape: of the model.
        send: takes an order to the worker of a rank; one that is gone must not make it raise.
        measured_load: [L, E] pairs that have been computed lately; None: nobody knows.
        measured_speeds: [D] of the owners; 1 is usual. None: they are not measured.
        title: of the worker of a rank, for people.

    Attributes:
        num_moved: copies of experts that transitions have loaded somewhere, cumulative.
        orders: which have to be told of the workers' answers.
        stirred: set whenever somebody comes or goes, for whoever looks after that, and clears it.
    """

    def __init__(
        self,
        board: TopologyBoard,
        shape: Shape,
        config: EngineConfig,
        *,
        send: Callable[[int, HoldExperts], None],
        measured_load: Callable[[], Float64Array | None],
        measured_speeds: Callable[[], Float64Array] | None = None,
        title: Callable[[int], str] = lambda rank: f"worker {rank}",
    ) -> None:
        self.num_moved = 0
        self._action = ""
        self._moves: dict[int, _Move] = {}  # by rank, while they are waited for
        self._board = board
        self._sparse = shape.sparse_layers
        self._ranks = config.placement.owner_ranks
        self._redundant = config.placement.redundant_experts
        self._measured_load = measured_load
        self._speeds = measured_speeds or (lambda: np.ones(len(self._ranks)))
        self._title = title
        self.orders = ExpertOrders(board, self._ranks, self._sparse, send=send, title=title)
        # [D] who ought to hold experts. Who ought to, and is not there, is expected back.
        self._members: BoolArray = np.array([rank in config.placement.expert_ranks for rank in self._ranks])
        self._known = [board.incarnations[rank] for rank in self._ranks]
        self._loose: set[int] = set()  # ranks that may hold more than the table gives them
        self._laggards: list[int] = []  # ranks that have not changed their routing after the last transition
        self._lock = asyncio.Lock()
        self.stirred = asyncio.Event()
        self._changed = asyncio.Event()  # the like, anew for each change
        board.observers.append(self._on_topology)

    # -- what is true ------------------------------------------------------------------------------------------------

    @property
    def action(self) -> str:
        """What is going on, for a person; "" if nothing."""
        if not self._moves:
            return self._action
        moves = self._moves.values()
        done, total = sum(move.num_done for move in moves), sum(move.num_experts for move in moves)
        return f"moving {done} of {total} experts"

    @property
    def missing(self) -> int:
        """(layer, expert) pairs that nobody holds at the moment."""
        return policy.missing(self._board.owners, self._present, self._sparse)

    @property
    def num_replicas(self) -> int:
        """Copies beyond one of each expert."""
        return policy.num_replicas(self._board.owners, self._sparse)

    @property
    def _present(self) -> BoolArray:
        """[D] who serves."""
        return np.array([self._board.incarnations[rank] != NOBODY for rank in self._ranks])

    def _on_topology(self, topology: Topology) -> None:
        """Ends the waits for who is gone. Who comes anew may have been started by an older table: it is told."""
        for owner, rank in enumerate(self._ranks):
            incarnation = topology.incarnations[rank]
            if incarnation == self._known[owner]:
                continue
            self._known[owner] = incarnation
            self.orders.drop(rank)
            self._loose.discard(rank)
            if incarnation > 0:
                self.orders.give(rank, self._board.owners)
        self.stirred.set()
        self._changed.set()
        self._changed = asyncio.Event()

    # -- actions -----------------------------------------------------------------------------------------------------

    async def take_in(self, rank: int) -> None:
        """A fresh worker gets its share of the experts. It is on the board, or will be soon.

        Raises:
            ConfigError: it does not come, or cannot hold them; it gets nothing then.
        """
        newcomer = np.array([owner_rank == rank for owner_rank in self._ranks])
        async with self._lock:
            before = self._members
            self._members = before | newcomer
            try:
                await self._carry_out(functools.partial(self._spread, newcomers=newcomer))
            except BaseException:
                self._members = before
                raise

    async def empty(self, rank: int) -> None:
        """The experts of a worker, which may be gone, go to the others. Returns when no home routes to it any more.

        Raises:
            ConfigError: the others cannot hold them; it keeps them then.
        """
        leaving = np.array([owner_rank == rank for owner_rank in self._ranks])
        async with self._lock:
            before = self._members
            if not (before & ~leaving).any():
                raise ConfigError(f"{self._title(rank)} is the last one that holds experts: it cannot be removed")
            self._members = before & ~leaving
            try:
                await self._carry_out(functools.partial(self._spread, newcomers=np.zeros_like(leaving)))
                if self._laggards:
                    raise ConfigError(f"{self._title(rank)} stays: {self._complaint(self._laggards)}")
            except BaseException:
                self._members = before
                raise

    async def replicate(self, layer: int, expert: int, count: int) -> None:
        """Let `count` workers hold one expert.

        Raises:
            ConfigError: there is no such expert, there are not so many workers, or one cannot hold it.
        """
        if 0 <= layer < len(self._sparse) and not self._sparse[layer]:
            raise ConfigError(f"layer {layer} has no experts: it is a dense one")
        async with self._lock:
            await self._carry_out(functools.partial(policy.replicate, layer=layer, expert=expert, count=count))

    async def rebalance(self) -> None:
        """Place all experts, and as many replicas as there are, by the load that has been measured lately.

        Raises:
            ConfigError: none has been measured yet, and no expert is without a worker; or a worker cannot hold what it
                should.
        """
        if self._measured_load() is None and not self.missing:  # without all experts nobody ever measures any
            raise ConfigError("no load has been measured yet: rebalance once requests have been served")
        async with self._lock:
            await self._carry_out(self._rebalanced)

    async def rebalance_if_worth_it(self) -> None:
        """As `rebalance`, if the load that has been measured says enough, and promises a gain.

        Raises:
            ConfigError: see `rebalance`.
        """
        load, present = self._measured_load(), self._present
        if load is None or not says_enough(load) or self._lock.locked() or not present[self._members].all():
            return
        planned = await self._plan(self._rebalanced, present & self._members)
        speeds = self._speeds()
        before, after = (policy.hottest(load, owners, present, speeds) for owners in (self._board.owners, planned))
        if after <= (1 - MIN_GAIN) * before:
            logger.info("moving experts: the busiest workers' time, %.2f of an even share, becomes %.2f", before, after)
            await self.rebalance()

    async def employ_idle(self) -> None:
        """Who was away for so long that the others took all its experts holds nothing when it is back: give it some.

        Raises:
            ConfigError: see `take_in`.
        """
        async with self._lock:
            holds = policy.copies_at(self._board.owners, len(self._ranks)).any(axis=(0, 1))
            idle = self._members & self._present & ~holds
            if idle.any():
                await self._carry_out(functools.partial(self._spread, newcomers=idle))

    async def move_to(self, owners: Int16Array) -> None:
        """Let this table be in force.

        Raises:
            ConfigError: it names somebody who is not there, or who cannot hold what it should.
        """

        def plan(load: Float64Array, before: Int16Array, present: BoolArray) -> Int16Array:
            absent = policy.copies_at(owners, len(present)).any(axis=(0, 1)) & ~present
            if absent.any():
                raise ConfigError(f"{self._title(self._ranks[int(absent.argmax())])} is not there to hold experts")
            return owners

        async with self._lock:
            await self._carry_out(plan)

    # -- plans -------------------------------------------------------------------------------------------------------

    def _load(self) -> Float64Array:
        """Measured, or nothing known."""
        measured = self._measured_load()
        shape = self._board.owners.shape[:2]
        return measured if measured is not None and measured.shape == shape else np.zeros(shape)

    def _spread(
        self, load: Float64Array, owners: Int16Array, present: BoolArray, *, newcomers: BoolArray
    ) -> Int16Array:
        absent = newcomers & ~present
        if absent.any():
            raise ConfigError(
                f"{self._title(self._ranks[int(absent.argmax())])} does not come up: see the server's log"
            )
        speeds = self._speeds()
        room = policy.room_for(owners, present, self._redundant, speeds)
        return policy.spread_to(load, owners, present, room, newcomers, speeds)

    def _rebalanced(self, load: Float64Array, owners: Int16Array, present: BoolArray) -> Int16Array:
        speeds = self._speeds()
        room = policy.room_for(owners, present, self._redundant, speeds)
        return policy.rebalance(load, owners, present, room, speeds)

    async def _plan(self, plan: Plan, present: BoolArray) -> Int16Array:
        return await asyncio.to_thread(considerate, plan, self._load(), self._board.owners, present)

    # -- transitions -------------------------------------------------------------------------------------------------

    async def _carry_out(self, plan: Plan) -> None:
        """Plan and move; again, if a worker dies in the middle."""
        try:
            for _ in range(MAX_ATTEMPTS):
                if await self._move(await self._plan(plan, await self._who_is_there())):
                    return
                logger.warning("a worker has gone while experts were moved: planning again")
            raise ConfigError("experts could not be moved: workers die again and again, see the server's log")
        finally:
            self._action = ""
            self._tidy_up()

    async def _who_is_there(self) -> BoolArray:
        """[D] members that serve; those that do not are waited for, but not for ever."""

        async def wait() -> None:
            while not self._present[self._members].all():
                self._action = "waiting for a worker that is being started"
                await self._changed.wait()

        try:
            await asyncio.wait_for(wait(), PATIENCE_S)
        except TimeoutError:
            absent = np.flatnonzero(self._members & ~self._present).tolist()
            names = ", ".join(self._title(self._ranks[owner]) for owner in absent)
            logger.warning("experts are moved without %s", names)
        there = self._present & self._members
        if not there.any():
            raise ConfigError("no worker is there to hold experts")
        return there

    async def _move(self, target: Int16Array) -> bool:
        """Let `target` be in force. False: a worker has gone that it needs.

        Raises:
            ConfigError: a worker cannot hold what it should, or does not get on.
        """
        if self._needs_who_is_gone(target):  # while it was planned
            return False
        gained = policy.moves(self._board.owners, target, len(self._ranks), self._sparse)
        lost = policy.moves(target, self._board.owners, len(self._ranks), self._sparse).any(axis=(0, 1))
        if not await self._load_all(policy.union(self._board.owners, target), gained):
            return False
        if self._needs_who_is_gone(target):
            return False
        self._loose.update(self._ranks[owner] for owner in np.flatnonzero(lost & self._present).tolist())
        count = int(gained.sum())
        if not np.array_equal(target, self._board.owners):
            self._action = f"sending tokens to {count} experts that have moved"
            self._board.place(target)
            self.num_moved += count
        await self._follow()
        return True

    def _needs_who_is_gone(self, target: Int16Array) -> bool:
        needed = policy.copies_at(target, len(self._ranks)).any(axis=(0, 1))
        return bool((needed & ~self._present).any())

    async def _load_all(self, owners: Int16Array, gained: BoolArray) -> bool:
        """Let everybody who gains experts hold what a table gives them. False: one of them has gone.

        Args:
            gained: [L, E, D] who gains which.
        """
        ranks = [self._ranks[owner] for owner in np.flatnonzero(gained.any(axis=(0, 1)))]
        self._loose.update(ranks)
        try:
            for rank in ranks:
                of_owner = gained[..., self._ranks.index(rank)]
                order = self.orders.give(rank, owners)
                self._moves[rank] = _Move(order, int(of_owner.sum()), int(of_owner.any(axis=1).sum()))
            for rank, move in self._moves.items():
                await self.orders.wait(rank, move.order)
            return all(self._board.incarnations[rank] == move.order.incarnation for rank, move in self._moves.items())
        finally:
            self._moves.clear()

    async def _follow(self) -> None:
        """Until every home routes by the table in force; those that do not are noted."""
        version = self._board.version
        try:
            await asyncio.wait_for(self._board.wait_applied(version), STANDSTILL_S)
            self._laggards = []
        except TimeoutError:
            self._laggards = self._board.laggards(version)
            logger.error("%s", self._complaint(self._laggards))

    def _complaint(self, laggards: Iterable[int]) -> str:
        names = ", ".join(map(self._title, laggards))
        return (
            f"{names} has not changed its routing for {STANDSTILL_S:g} s: experts that have moved stay where they were "
            "as well. End that worker (kill -9), which is replaced then, and ask again"
        )

    def _tidy_up(self) -> None:
        """Who holds more than the table in force gives forgets it; who is about to be stopped need not."""
        if self._laggards:
            return
        for owner, rank in enumerate(self._ranks):
            if rank in self._loose and self._members[owner]:
                self.orders.give(rank, self._board.owners)
        self._loose.clear()

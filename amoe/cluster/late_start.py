"""Starting one worker beside others that serve: it is told who is there, and holds what the table of owners says."""

from __future__ import annotations

import asyncio
import logging

from amoe.cluster.cluster import WorkerCluster
from amoe.cluster.launcher import WorkerHandle
from amoe.cluster.orders import STANDSTILL_S
from amoe.cluster.patience import ready_in_time
from amoe.cluster.topology import TopologyBoard
from amoe.engine.messages import HoldExperts, Holding, LayerHeld, Ready
from amoe.errors import ConfigError, EngineDeadError
from amoe.policy.placement import experts_of

logger = logging.getLogger(__name__)

START_SILENCE_S = 60.0  # a worker that says nothing for so long while it starts will never be ready
END_GRACE_S = 5.0  # for one that was killed; it may not end, if it waits for a disk
_CATCH_UP = 0  # the number of the order that this module gives: its answer comes before anybody else listens


class LateStarter:
    """Starts workers of `cluster` that join `board` afterwards."""

    def __init__(self, cluster: WorkerCluster, board: TopologyBoard) -> None:
        self._cluster = cluster
        self._board = board
        self._endings: set[asyncio.Task[None]] = set()

    async def start(self, rank: int, incarnation: int) -> tuple[WorkerHandle, Ready]:
        """A worker that is ready, and holds what the table of owners gives it now: let it join before anything else is
        awaited.

        Raises:
            ConfigError: it cannot start; the message is for the user.
            EngineDeadError: it failed or died, or the one before it has not ended yet.
        """
        if (former := self._cluster.workers.get(rank)) is not None:
            raise EngineDeadError(f"{former.describe()} does not end although it was killed: nobody can take its place")
        worker = await self._cluster.launch(rank, incarnation)
        try:
            told = self._board.topology
            held = self._share_of(rank)
            worker.channel.send(told)
            ready = await self._wait_ready(worker)
            while (wanted := self._share_of(rank)) != held:
                held = await _hold(worker, wanted)
            return worker, ready
        except asyncio.CancelledError:
            await self._end(worker)
            raise
        except OSError as error:  # it has gone before it could be told anything
            await self._end(worker)
            raise EngineDeadError(f"{worker.describe_exit()} while starting{worker.describe_output()}") from error
        except Exception:
            await self._end(worker)
            raise

    async def _end(self, worker: WorkerHandle) -> None:
        """Kill a worker, and wait a moment for its end. One that does not end holds up nobody but who comes next."""
        ending = asyncio.create_task(self._cluster.retire(worker), name=f"amoe-end-{worker.rank}")
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)
        done, _ = await asyncio.wait({ending}, timeout=END_GRACE_S)
        if not done:
            logger.warning(
                "%s does not end although it was killed: nobody can take its place before", worker.describe()
            )

    async def _wait_ready(self, worker: WorkerHandle) -> Ready:
        ready = await ready_in_time(worker, START_SILENCE_S, lambda _worker, _message: None)
        self._cluster.check_late(worker, ready)
        return ready

    def _share_of(self, rank: int) -> list[list[int]]:
        """[num_layers] experts that a rank ought to hold, ascending."""
        shape, owner_ranks = self._cluster.shape, self._cluster.config.placement.owner_ranks
        if shape is None or rank not in owner_ranks:
            return []
        held = experts_of(self._board.owners, owner_ranks.index(rank), shape.sparse_layers)
        return [list(held.get(layer, ())) for layer in range(shape.num_layers)]


async def _hold(worker: WorkerHandle, experts: list[list[int]]) -> list[list[int]]:
    """Let a worker that nobody else listens to hold these experts; returns them.

    Raises:
        ConfigError: it cannot.
        EngineDeadError: it has died, or does not get on.
    """
    loop = asyncio.get_running_loop()
    worker.channel.send(HoldExperts(_CATCH_UP, experts))
    try:
        async with asyncio.timeout(STANDSTILL_S) as patience:
            async for message in worker.channel:
                if isinstance(message, LayerHeld):
                    patience.reschedule(loop.time() + STANDSTILL_S)
                elif isinstance(message, Holding) and message.order == _CATCH_UP:
                    if message.complaint:
                        raise ConfigError(f"{worker.describe()} cannot load its experts: {message.complaint}")
                    return experts
    except TimeoutError as error:
        raise EngineDeadError(
            f"{worker.describe()} has not got on with loading experts for {STANDSTILL_S:g} s: its storage may hang"
        ) from error
    raise EngineDeadError(f"{worker.describe_exit()} while loading experts{worker.describe_output()}")

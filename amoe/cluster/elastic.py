"""Changes a running cluster: how many expert workers there are, and who holds which experts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import Coroutine
from typing import Any

from amoe.cluster.admin import ClusterStatus
from amoe.cluster.autoscaler import Autoscaler
from amoe.cluster.cluster import WorkerCluster
from amoe.cluster.placement_manager import PlacementManager
from amoe.cluster.process import title_of
from amoe.cluster.rebalancer import Rebalancer
from amoe.cluster.supervised import SupervisedEngine
from amoe.cluster.supervisor import Supervisor
from amoe.cluster.topology import TopologyBoard
from amoe.engine.emulated_device import Shape
from amoe.engine.messages import Heartbeat, HoldExperts, Holding, LayerHeld, ToServer
from amoe.errors import ConfigError, UnfinishedError

logger = logging.getLogger(__name__)

EMPTY_BEATS = 2  # heartbeats in a row that show empty queues
EMPTY_TIMEOUT_S = 10.0  # whatever is left then is redone elsewhere: to stop early does no harm


class ElasticCluster:
    """See `amoe.cluster.admin.ClusterAdmin`. Use it in the event loop of the cluster: `run`, then `close`.

    Args:
        shape: of the model.
        supervisor: of the cluster's workers.
    """

    def __init__(
        self,
        cluster: WorkerCluster,
        engine: SupervisedEngine,
        board: TopologyBoard,
        supervisor: Supervisor,
        shape: Shape,
    ) -> None:
        self._cluster = cluster
        self._engine = engine
        self._board = board
        self._supervisor = supervisor
        self._shape = shape
        self._placement = cluster.config.placement
        self._manager = PlacementManager(
            board,
            shape,
            cluster.config,
            send=self._send,
            measured_load=engine.measured_load,
            measured_speeds=engine.measured_speeds,
            title=lambda rank: title_of(self._placement, rank),
        )
        autoscale = cluster.config.autoscale
        self._autoscaler = None if autoscale is None else Autoscaler(autoscale, self)
        self._lock = asyncio.Lock()
        self._action = ""
        self._empty_beats: dict[int, int] = defaultdict(int)
        self._beaten = asyncio.Event()
        self._num_moved = 0  # that the metrics have been told of
        self._tasks: list[asyncio.Task[None]] = []
        supervisor.on_message.append(self._hear)

    def run(self) -> None:
        """Start what goes on in the background: rebalancing and autoscaling, as far as they are configured."""
        rebalancer = Rebalancer(self._manager, self._cluster.config.steering.rebalance_interval_s)
        self._begin(rebalancer.run(), "amoe-placement")
        if self._autoscaler is not None:
            self._begin(self._autoscaler.run(), "amoe-autoscaler")

    async def close(self) -> None:
        """End the background. Idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(_log_failure)
        self._tasks.append(task)

    # -- what is asked -----------------------------------------------------------------------------------------------

    def status(self) -> ClusterStatus:
        return ClusterStatus(
            version=self._board.version,
            workers=self._supervisor.statuses(),
            num_expert_workers=len(self._members()),
            max_expert_workers=len(self._placement.owner_ranks),
            num_layers=self._shape.num_layers,
            num_experts=self._shape.num_experts,
            num_replicas=self._manager.num_replicas,
            missing=self._manager.missing,
            action=self._manager.action or self._action,
        )

    async def scale_experts(self, count: int) -> ClusterStatus:
        self._check_count(count)
        async with self._acting():
            members = self._members()
            if count > len(members):
                await self._grow(self._free_ranks(count - len(members)), count)
            for rank in sorted(members, reverse=True)[: max(0, len(members) - count)]:
                try:
                    await self._shrink(rank)
                except ConfigError as error:
                    raise UnfinishedError(
                        f"{error}; {self._num_serving} expert workers serve, not {count}; ask again"
                    ) from error
        return self.status()

    async def replicate(self, layer: int, expert: int, count: int) -> ClusterStatus:
        async with self._acting():
            await self._manager.replicate(layer, expert, count)
        return self.status()

    async def rebalance(self) -> ClusterStatus:
        async with self._acting():
            await self._manager.rebalance()
        return self.status()

    def _members(self) -> list[int]:
        """Ranks of workers that hold experts, or ought to."""
        return [p.rank for p in self._supervisor.places if p.role != "attention" and p.state != "draining"]

    @property
    def _num_serving(self) -> int:
        return sum(p.role != "attention" and p.state == "serving" for p in self._supervisor.places)

    def _free_ranks(self, count: int) -> list[int]:
        """Places for `count` more workers.

        Raises:
            UnfinishedError: a worker that shall leave has not ended, and keeps its place until then.
        """
        free = [rank for rank in self._placement.owner_ranks if rank not in self._supervisor.ranks]
        if len(free) < count:
            draining = ", ".join(place.title for place in self._supervisor.places if place.state == "draining")
            raise UnfinishedError(f"there is no place for {count} more: {draining} has not ended yet; ask again later")
        return free[:count]

    def _check_count(self, count: int) -> None:
        placement = self._placement
        if placement.colocated or placement.expert_workers == 0:
            raise ConfigError(
                "the workers of this server hold attention as well as experts: none can be added or removed; start it "
                "with --expert-workers N"
            )
        bounds = self._cluster.config.autoscale
        if bounds is not None and not bounds.min_workers <= count <= bounds.max_workers:
            raise ConfigError(
                f"--autoscale-experts {bounds.min_workers}:{bounds.max_workers} of this server would take {count} "
                "expert workers back at once: ask for a number within, or start it without"
            )
        most = len(placement.owner_ranks)
        if not 1 <= count <= most:
            raise ConfigError(
                f"there can be 1 to {most} expert workers, not {count}: --max-expert-workers says how many at most"
            )

    @contextlib.asynccontextmanager
    async def _acting(self) -> Any:
        """One action at a time."""
        async with self._lock:
            try:
                yield
            finally:
                self._action = ""
                self._tell_moves()

    # -- more, and fewer ---------------------------------------------------------------------------------------------

    async def _grow(self, ranks: list[int], count: int) -> None:
        """Start workers side by side, then give each its share; there shall be `count` then.

        Raises:
            UnfinishedError: not all could be had; those that could serve.
        """
        self._action = f"starting {', '.join(title_of(self._placement, rank) for rank in ranks)}"
        results = await asyncio.gather(*(self._supervisor.add(rank) for rank in ranks), return_exceptions=True)
        failures = [result for result in results if result is not None]
        for rank, result in zip(ranks, results, strict=True):
            if result is None:
                try:
                    await self._take_in(rank)
                except (ConfigError, UnfinishedError) as error:  # the next one may get its share all the same
                    failures.append(error)
        for failure in failures:
            if not isinstance(failure, ConfigError | UnfinishedError):
                raise failure
        if failures:
            reasons = "; ".join(map(str, failures))
            raise UnfinishedError(f"{reasons}; {self._num_serving} of {count} expert workers serve; ask again")

    async def _take_in(self, rank: int) -> None:
        try:
            await self._manager.take_in(rank)
        except ConfigError:
            await self._supervisor.drain(rank)
            await self._supervisor.remove(rank)
            raise

    async def _shrink(self, rank: int) -> None:
        """Let a worker leave, once nobody needs it.

        Raises:
            ConfigError: the others cannot hold its experts; it stays.
        """
        title = title_of(self._placement, rank)
        self._action = f"draining {title}"
        await self._supervisor.drain(rank)
        try:
            await self._manager.empty(rank)
            await self._wait_empty(rank)
        except BaseException:
            self._supervisor.keep(rank)
            raise
        self._action = f"stopping {title}"
        await self._supervisor.remove(rank)

    async def _wait_empty(self, rank: int) -> None:
        """Until nothing waits at a worker to which nobody sends any more, or it is gone."""
        self._empty_beats[rank] = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EMPTY_TIMEOUT_S):
                while self._empty_beats[rank] < EMPTY_BEATS and rank in self._board.present:
                    await self._beaten.wait()

    # -- messages ----------------------------------------------------------------------------------------------------

    def _hear(self, rank: int, message: ToServer) -> None:
        if isinstance(message, Holding):
            self._manager.orders.on_holding(rank, message)
            self._tell_moves()
        elif isinstance(message, LayerHeld):
            self._manager.orders.on_layer_held(rank, message)
        elif isinstance(message, Heartbeat):
            is_empty = not any(queue.depth for queue in message.stats.queues)
            self._empty_beats[rank] = self._empty_beats[rank] + 1 if is_empty else 0
            self._beaten.set()
            self._beaten = asyncio.Event()
            if self._autoscaler is not None:
                self._autoscaler.observe(message.stats)

    def _send(self, rank: int, order: HoldExperts) -> None:
        worker = self._cluster.workers.get(rank)
        if worker is not None:
            with contextlib.suppress(OSError):  # it has gone: the board will say so
                worker.channel.send(order)

    def _tell_moves(self) -> None:
        if (count := self._manager.num_moved - self._num_moved) > 0:
            self._engine.metrics.experts_moved(count)
            self._num_moved = self._manager.num_moved


def _log_failure(task: asyncio.Task[None]) -> None:
    """What nobody waits for must not fail unseen."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("%s has failed", task.get_name(), exc_info=error)

"""Keeps the workers of a server alive: notices who has died, hangs or is cut off, and starts its next life.

The others go on meanwhile. What happens when a worker is lost, in this order:

1. The topology says that nobody is there: homes redo what waits for its answer (`TopologyBoard.leave`).
2. It is *fenced*: killed, whatever it is at. Never are there two lives of one rank, which would write into the same
   rings. The next one is started only when this one has been reaped.
3. The engine hears its last words, and gives its open sequences to others (`AsyncEngine.lose`).
4. Its next life is started (`LateStarter`): at once, or after a pause if lives are short (`Crashes`).
5. It joins the topology, and the engine listens to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine

from amoe.clock import Clock, MonotonicClock
from amoe.cluster.admin import WorkerStatus
from amoe.cluster.cluster import WorkerCluster
from amoe.cluster.coverage import Coverage
from amoe.cluster.late_start import LateStarter
from amoe.cluster.launcher import WorkerHandle
from amoe.cluster.places import Place
from amoe.cluster.process import title_of
from amoe.cluster.supervised import SupervisedEngine
from amoe.cluster.topology import TopologyBoard
from amoe.engine.messages import Alive, Applied, Failed, Heartbeat, Pulse, ToServer, Unanswered
from amoe.engine.roles import role_of
from amoe.errors import AmoeError, ConfigError, UnfinishedError
from amoe.metrics.cluster import LossKind
from amoe.policy.patience import Patience, StepTime
from amoe.policy.supervision import Crashes, LifeSigns
from amoe.stats import WorkerStats

logger = logging.getLogger(__name__)

EXIT_GRACE_S = 0.2  # a channel ends a moment before the exit of its process is known, which tells more
FENCE_PATIENCE_S = 10.0
# A link over torch.distributed takes some 16 crossings of the network and back: 1.6 s, where one takes 0.1 s.
LINKING_S = {"distributed": 5.0}
LEAVE_GRACE_S = 10.0
BURIAL_PATIENCE_S = 30.0  # of whoever asked a worker to leave; it includes what the worker has said last


class Supervisor:
    """See above. Use it in the event loop of the cluster: `run`, then `stop` before the cluster is stopped.

    Args:
        cluster: started.
        engine: made with `supervised`, on the channels of that cluster.
        board: on which all of them are present.

    Attributes:
        on_message: called with rank and every message of a worker that has joined, beside what happens here.
        on_change: called whenever a worker's state has changed.
    """

    def __init__(
        self, cluster: WorkerCluster, engine: SupervisedEngine, board: TopologyBoard, *, clock: Clock | None = None
    ) -> None:
        self.on_message: list[Callable[[int, ToServer], None]] = []
        self.on_change: list[Callable[[], None]] = []
        self._cluster = cluster
        self._config = cluster.config
        self._engine = engine
        self._board = board
        self._clock = clock or MonotonicClock()
        self._starter = LateStarter(cluster, board)
        self._coverage = Coverage(cluster, board)
        self._signs = LifeSigns(self._config.failure.timeout_s)
        self._look_s = Patience(self._config.failure.timeout_s).look_s
        self._places: dict[int, Place] = {}
        self._lives: dict[int, int] = {}  # the last incarnation of each rank that there has been
        self._watching: asyncio.Task[None] | None = None
        self._is_stopping = False

    # -- life --------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Watch the workers of the cluster from now on."""
        now = self._clock.now()
        for rank, worker in self._cluster.workers.items():
            place = self._make_place(rank)
            place.serve(worker, now)
            self._lives[rank] = worker.incarnation
            self._signs.expect(rank, LINKING_S.get(self._config.transport, 0.0))
        self._engine.on_message = self._hear
        self._engine.on_gone = self._on_gone
        self._cluster.on_death = self._on_exit
        self._watching = asyncio.create_task(self._watch(), name="amoe-supervisor")
        for rank, worker in self._cluster.workers.items():
            if worker.exited.is_set():  # between its readiness and now
                self._on_exit(rank, worker.describe_exit())
        self._changed()

    async def stop(self) -> None:
        """Replace nobody any more. The workers go on; one that was being started is killed. Idempotent."""
        self._is_stopping = True
        tasks = [place.successor for place in self._places.values()] + [self._watching]
        running = [task for task in tasks if task is not None]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    @property
    def places(self) -> list[Place]:
        """By rank."""
        return [self._places[rank] for rank in sorted(self._places)]

    @property
    def ranks(self) -> set[int]:
        """Of workers that there are or ought to be."""
        return set(self._places)

    def statuses(self) -> list[WorkerStatus]:
        """Of all workers, by rank."""
        now = self._clock.now()
        return [place.status(now) for place in self.places]

    def _make_place(self, rank: int) -> Place:
        failure = self._config.failure
        self._places[rank] = place = Place(
            rank,
            title_of(self._config.placement, rank),
            role_of(self._config, rank),
            Crashes(backoff_s=failure.backoff_s, max_backoff_s=failure.max_backoff_s),
            first_incarnation=self._lives.get(rank, -1) + 1,  # another worker may have had this rank
        )
        return place

    # -- what workers say --------------------------------------------------------------------------------------------

    def _hear(self, rank: int, message: ToServer) -> None:
        if isinstance(message, Heartbeat):
            self._signs.beat(rank, _oldest_s(message.stats))
        elif isinstance(message, Alive):
            self._signs.beat(rank, message.oldest_s)
        elif isinstance(message, Pulse):
            step = StepTime(message.step_s, message.usual_s, message.free_s, message.longest_s)
            self._signs.pulse(rank, step)
        elif isinstance(message, Applied):
            self._board.on_applied(rank, message.version)
        elif isinstance(message, Unanswered):
            self._signs.accuse(rank, message.rank, message.seconds)
        elif isinstance(message, Failed) and (place := self._places.get(rank)) is not None:
            place.last_words = message.message
        for listener in self.on_message:
            listener(rank, message)

    def _on_exit(self, rank: int, reason: str) -> None:
        if (place := self._places.get(rank)) is not None and place.state in ("serving", "draining"):
            self._lose(place, "exit", f"{reason}: {place.last_words}" if place.last_words else reason)

    def _on_gone(self, rank: int, reason: str) -> None:
        place = self._places.get(rank)
        if place is not None and (worker := place.worker) is not None:
            asyncio.get_running_loop().call_later(EXIT_GRACE_S, self._on_hung_up, place, worker, reason)

    def _on_hung_up(self, place: Place, worker: WorkerHandle, reason: str) -> None:
        """The channel of a worker has ended, and it has not exited: its link is cut, or it broke the protocol."""
        if place.worker is worker and place.state in ("serving", "draining"):
            self._lose(place, "cut", f"{worker.describe()}: {reason}")

    # -- who is dead -------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        try:
            last = self._clock.now()
            while True:
                await asyncio.sleep(self._look_s)
                now = self._clock.now()
                # Time in which this process did not run says nothing about the workers, whose messages lie unread.
                self._signs.advance(min(now - last, 2 * self._look_s))
                last = now
                self._look(now)
        except Exception:  # unseen, nobody would be replaced ever after
            logger.exception("the supervisor has failed")
            self._engine.die("the supervisor has failed")

    def _look(self, now: float) -> None:
        serving = {rank: place.role for rank, place in self._places.items() if place.state == "serving"}
        homes = {rank for rank, role in serving.items() if role != "experts"}
        owners = {rank for rank, role in serving.items() if role != "attention"}
        for loss in self._signs.losses(homes, owners, self._seems_to_run):
            place = self._places[loss.rank]
            assert place.worker is not None
            self._lose(place, loss.kind, f"{place.worker.describe()} {loss}")
        for place in self._places.values():
            place.forgive(now)
        self._tell_health(now)

    def _seems_to_run(self, rank: int) -> bool:
        worker = self._places[rank].worker
        return worker is not None and worker.seems_to_run()

    def _lose(self, place: Place, kind: LossKind, reason: str) -> None:
        """A worker is dead, or as good as dead. Nothing happens once the server is going."""
        worker = place.worker
        if self._is_stopping or worker is None or place.state not in ("serving", "draining"):
            return
        is_draining = place.state == "draining"
        place.fall(reason, self._clock.now())
        self._signs.forget(place.rank)
        self._board.leave(place.rank)
        worker.kill()
        place.worker = None
        logger.error("%s: %s", reason, self._coverage.consequence(place))
        self._engine.metrics.worker_lost(place.rank, place.role, kind)
        if is_draining:  # whoever drains it sees to what it held, and needs no other
            place.state = "draining"
            self._begin(place, self._bury(place))
        else:
            self._begin(place, self._replace(place))
        self._changed()

    # -- the next life -----------------------------------------------------------------------------------------------

    def _begin(self, place: Place, work: Coroutine[None, None, None]) -> None:
        place.successor = asyncio.create_task(work, name=f"amoe-replace-{place.rank}")
        place.successor.add_done_callback(self._end_if_failed)

    def _end_if_failed(self, task: asyncio.Task[None]) -> None:
        """A bug here must not leave a place empty for ever, and the server healthy."""
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("the supervisor has failed", exc_info=error)
            self._engine.die("the supervisor has failed")

    async def _replace(self, place: Place) -> None:
        """Bury who was there, and start lives in that place until one serves."""
        await self._bury(place)
        while True:
            await self._pause(place)
            try:
                worker = await self._start(place)
                break
            except Exception as error:
                if not isinstance(error, AmoeError | OSError):
                    logger.exception("%s could not be started", place.title)
                place.fall(str(error) or type(error).__name__, self._clock.now())
                self._engine.metrics.worker_lost(place.rank, place.role, "start")
                logger.error("%s could not be started anew: %s", place.title, error)
        seconds = self._clock.now() - (place.lost_at or 0.0)
        logger.warning("%s serves again, %.1f s after its predecessor was lost", worker.describe(), seconds)
        self._engine.metrics.worker_back(place.rank, place.role, seconds)
        self._changed()

    async def _bury(self, place: Place) -> None:
        """What a dead worker has said is heard; then its rank is free. Nothing happens if it is buried."""
        async with place.burial:
            place.worker = None
            await self._engine.lose(place.rank, place.reason)
            worker = self._cluster.workers.get(place.rank)
            if worker is not None:
                await self._fence(worker)

    async def _fence(self, worker: WorkerHandle) -> None:
        """Let it end, however long that takes."""
        worker.kill()
        while not worker.exited.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(worker.exited.wait(), FENCE_PATIENCE_S)
                break
            logger.warning("%s does not end although it was killed: nobody takes its place before", worker.describe())
        await self._cluster.retire(worker)

    async def _pause(self, place: Place) -> None:
        pause_s = place.crashes.pause_s
        if pause_s > 0:
            place.state, place.retry_at = "waiting", self._clock.now() + pause_s
            logger.warning(
                "%s: next attempt in %g s (died %d times in a row)", place.title, pause_s, place.crashes.count
            )
            self._changed()
            await asyncio.sleep(pause_s)

    async def _start(self, place: Place) -> WorkerHandle:
        """Start a life, and let it serve.

        Raises:
            AmoeError: it did not get so far.
        """
        rank = place.rank
        incarnation = self._lives[rank] = self._lives.get(rank, -1) + 1
        place.state, place.incarnation = "starting", incarnation
        self._changed()
        worker, ready = await self._starter.start(rank, incarnation)
        # Nothing is awaited from here on: it holds what the table says now. The topology comes before any request.
        place.serve(worker, self._clock.now())
        self._signs.expect(rank, LINKING_S.get(self._config.transport, 0.0))
        self._board.join({rank: (incarnation, ready.address)})
        self._engine.attach(rank, worker.channel)
        if worker.exited.is_set():
            self._on_exit(rank, worker.describe_exit())
        self._changed()
        return worker

    # -- more workers, and fewer -------------------------------------------------------------------------------------

    async def add(self, rank: int) -> None:
        """Start a worker at a rank where nobody is; it serves afterwards, and is kept alive like all others.

        Raises:
            ConfigError: it could not be started; the message says why.
        """
        if rank in self._places:
            raise ValueError(f"rank {rank} is taken")
        place = self._make_place(rank)
        try:
            await self._start(place)  # once it serves, it is replaced like all others, even if it is gone by now
        except BaseException as error:
            del self._places[rank]
            self._changed()
            if isinstance(error, AmoeError | OSError):
                raise ConfigError(f"{place.title} could not be started: {error}") from error
            raise

    async def drain(self, rank: int) -> None:
        """A worker is about to leave: should it die, nobody takes its place. Then call `remove`, or `keep`."""
        place = self._places[rank]
        if place.successor is not None and not place.successor.done():
            place.successor.cancel()
            await asyncio.gather(place.successor, return_exceptions=True)
        place.state = "draining"
        self._changed()

    def keep(self, rank: int) -> None:
        """A worker that is draining stays after all; one that has died meanwhile is replaced."""
        place = self._places[rank]
        if place.worker is not None:
            place.state = "serving"
        elif not self._is_stopping:
            place.state = "lost"
            self._begin(place, self._replace(place))
        self._changed()

    async def remove(self, rank: int) -> None:
        """Let a worker leave that is draining, and to which nobody sends anything any more.

        Raises:
            UnfinishedError: it does not end although it was killed. Its rank is free once it has ended.
        """
        place = self._places[rank]
        place.worker = None  # its end is no loss
        self._signs.forget(rank)
        self._board.leave(rank)
        worker = self._cluster.workers.get(rank)
        if worker is not None:
            worker.request_stop()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(worker.exited.wait(), LEAVE_GRACE_S)
        place.reason = f"{place.title} has left"
        place.successor = leaving = asyncio.create_task(
            self._leave(place, place.successor), name=f"amoe-leave-{place.rank}"
        )
        await asyncio.wait((leaving,), timeout=BURIAL_PATIENCE_S)
        if not leaving.done():
            leaving.add_done_callback(self._end_if_failed)
            raise UnfinishedError(
                f"{place.title} does not end although it was killed (it waits for a disk or a driver, say): nothing is "
                "sent to it any more, and it holds up nobody; its place is free once it has ended"
            )
        leaving.result()

    async def _leave(self, place: Place, burial: asyncio.Task[None] | None) -> None:
        """`burial`: of one that has died before, if it is not over."""
        if burial is not None:
            await asyncio.gather(burial, return_exceptions=True)
        await self._bury(place)
        del self._places[place.rank]
        self._engine.metrics.worker_removed(place.rank)
        logger.info("%s has left", place.title)
        self._changed()

    # -- what others are told ----------------------------------------------------------------------------------------

    def _changed(self) -> None:
        self._tell_health(self._clock.now())
        for listener in self.on_change:
            listener()

    def _tell_health(self, now: float) -> None:
        """A worker that dies again and again is trouble only if nothing can be served without it."""
        limit = self._config.failure.max_crashes
        troubles = [place.trouble(limit, now) for place in self.places]
        words = "; ".join(filter(None, (loop or place.note for loop, place in zip(troubles, self.places, strict=True))))
        is_down = bool(words) and not self._coverage.can_serve()
        self._engine.is_awaited = is_down and any(place.note for place in self.places)
        is_trouble = is_down and any(troubles)
        self._engine.trouble, self._engine.note = (words, "") if is_trouble else ("", words)


def _oldest_s(stats: WorkerStats) -> float:
    """How long the oldest token waits for an expert at that worker."""
    return max((queue.age_s for queue in stats.queues if queue.kind == "experts" and queue.depth), default=0.0)

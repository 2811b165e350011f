"""What operators have asked the cluster to do: each goes on, once begun, whether its client stays or not."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from amoe.clock import Clock, MonotonicClock
from amoe.cluster.admin import ActionState, ActionStatus, AdminDesk, AdminView, ClusterAdmin, Order
from amoe.cluster.front_messages import Answer, Ask
from amoe.errors import AmoeError, ConfigError, EngineDeadError, UnfinishedError

logger = logging.getLogger(__name__)

MAX_REMEMBERED = 16


@dataclass(slots=True)
class _Action:
    """One order. Times are the clock's; `ended_at` is None while it is at it. See `ActionStatus`."""

    id: int
    title: str
    began_at: float
    ended_at: float | None = None
    error: str = ""
    is_refused: bool = False

    def status(self, now: float) -> ActionStatus:
        seconds = round((now if self.ended_at is None else self.ended_at) - self.began_at, 3)
        return ActionStatus(id=self.id, action=self.title, state=self.state, seconds=seconds, error=self.error)

    @property
    def state(self) -> ActionState:
        if self.ended_at is None:
            return "running"
        if self.error:
            return "refused" if self.is_refused else "failed"
        return "done"


class LocalDesk:
    """See `AdminDesk`: over a cluster that this process supervises. It remembers the last actions. `close` it before
    the cluster's supervisor is stopped."""

    def __init__(self, admin: ClusterAdmin, clock: Clock | None = None) -> None:
        self._admin = admin
        self._clock = clock or MonotonicClock()
        self._ids = itertools.count(1)
        self._recent: deque[_Action] = deque(maxlen=MAX_REMEMBERED)
        self._tasks: set[asyncio.Task[None]] = set()

    async def look(self) -> AdminView:
        now = self._clock.now()
        return AdminView(status=self._admin.status(), actions=[action.status(now) for action in self._recent])

    async def order(self, order: Order, *, wait: bool) -> int:
        action = _Action(next(self._ids), str(order), self._clock.now())
        self._recent.append(action)
        logger.info("admin: %s", action.title)
        task = asyncio.create_task(self._run(action, order), name=f"amoe-admin-{action.id}")
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        if wait:
            await asyncio.shield(task)  # whatever becomes of who waits, half a move helps nobody
        return action.id

    async def close(self) -> None:
        """Break off what is under way: nobody replaces or moves anything any more. Idempotent."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, action: _Action, order: Order) -> None:
        try:
            await order.carry_out(self._admin)
        except AmoeError as error:
            action.error, action.is_refused = str(error), isinstance(error, ConfigError)
            logger.warning("admin: %s: %s", action.title, error)
            raise
        except asyncio.CancelledError:
            action.error = "the server was stopped"
            raise
        except Exception:
            action.error = "it failed; the server's log says why"
            logger.exception("admin: %s", action.title)
            raise
        finally:
            action.ended_at = self._clock.now()
            if not action.error:
                logger.info("admin: %s: done after %.1f s", action.title, action.ended_at - action.began_at)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # it has been told: by the log, and to whoever waits


_ERRORS: dict[str, type[AmoeError]] = {kind.__name__: kind for kind in (ConfigError, UnfinishedError, EngineDeadError)}


async def answer(desk: AdminDesk, ask: Ask) -> Answer:
    """What a desk says to what a `RemoteDesk` asks."""
    try:
        if ask.order is None:
            return Answer(ask.number, view=await desk.look())
        return Answer(ask.number, action=await desk.order(ask.order, wait=ask.wait))
    except AmoeError as error:
        return Answer(ask.number, error=type(error).__name__, message=str(error))
    except Exception:  # the log has it
        return Answer(ask.number, error=Exception.__name__)


class RemoteDesk:
    """See `AdminDesk`: asks the process that supervises.

    Args:
        send: takes a question there; what is answered has to be given to `on_answer`.
    """

    def __init__(self, send: Callable[[Ask], None]) -> None:
        self._send = send
        self._numbers = itertools.count()
        self._asked: dict[int, asyncio.Future[Answer]] = {}
        self._end = ""

    async def look(self) -> AdminView:
        view = (await self._ask(None)).view
        assert view is not None, "that was asked for"
        return view

    async def order(self, order: Order, *, wait: bool) -> int:
        return (await self._ask(order, wait)).action

    async def _ask(self, order: Order | None, wait: bool = True) -> Answer:
        if self._end:
            raise EngineDeadError(self._end)
        number = next(self._numbers)
        self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            self._send(Ask(number, order, wait))
            answer = await self._asked[number]
        finally:
            del self._asked[number]
        if answer.error:
            raise _ERRORS.get(answer.error, RuntimeError)(answer.message or "the log of the server says why")
        return answer

    def end(self, reason: str) -> None:
        """Nobody will answer any more."""
        self._end = reason
        for asked in self._asked.values():
            if not asked.done():
                asked.set_exception(EngineDeadError(reason))

    def on_answer(self, answer: Answer) -> None:
        """One has come."""
        asked = self._asked.get(answer.number)
        if asked is not None and not asked.done():
            asked.set_result(answer)

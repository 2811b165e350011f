"""What operators have asked the cluster to do: each goes on, once begun, whether its client stays or not."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Literal

from amoe.clock import Clock, MonotonicClock
from amoe.cluster.admin import ClusterStatus
from amoe.errors import AmoeError, ConfigError

logger = logging.getLogger(__name__)

MAX_REMEMBERED = 16


@dataclass(slots=True)
class Action:
    """One thing that was asked for.

    Attributes:
        number: counts up from 1.
        title: for a person: `scale to 3 expert workers`.
        began_at, ended_at: by the server's clock; None: it is still at it.
        error: why it failed; "" if it did not.
        is_refused: it could not be done, and nothing is wrong with the server.
    """

    number: int
    title: str
    began_at: float
    ended_at: float | None = None
    error: str = ""
    is_refused: bool = False

    @property
    def state(self) -> Literal["running", "done", "refused", "failed"]:
        if self.ended_at is None:
            return "running"
        if self.error:
            return "refused" if self.is_refused else "failed"
        return "done"


class AdminActions:
    """Runs actions as tasks of their own, and remembers the last ones. The cluster does one at a time."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or MonotonicClock()
        self._count = 0
        self._recent: deque[Action] = deque(maxlen=MAX_REMEMBERED)
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, title: str, work: Coroutine[Any, Any, ClusterStatus]) -> tuple[Action, asyncio.Task[None]]:
        """Begin `work`. The task raises what it raises."""
        self._count += 1
        action = Action(self._count, title, self._clock.now())
        self._recent.append(action)
        logger.info("admin: %s", title)
        task = asyncio.create_task(self._run(action, work), name=f"amoe-admin-{action.number}")
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return action, task

    def as_json(self) -> list[dict[str, Any]]:
        """The last actions, oldest first."""
        now = self._clock.now()
        return [
            {
                "id": action.number,
                "action": action.title,
                "state": action.state,
                "seconds": round((now if action.ended_at is None else action.ended_at) - action.began_at, 3),
                "error": action.error,
            }
            for action in self._recent
        ]

    async def _run(self, action: Action, work: Coroutine[Any, Any, ClusterStatus]) -> None:
        try:
            await work
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

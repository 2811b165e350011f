"""One life of one worker in an actor, as the server sees it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from amoe.cluster.channel import ready_message
from amoe.cluster.launcher import WorkerHandle
from amoe.cluster.ray_cluster.actor import Whereabouts, kill_process
from amoe.cluster.ray_cluster.session import RayThread
from amoe.engine.control import AsyncControlChannel
from amoe.engine.messages import Loading, Ready, Stop
from amoe.errors import ConfigError, EngineDeadError

# A host that is cut off confirms nothing: then the closed channel and the next incarnation are what fences it.
FENCE_S = 1.0
_EXIT_GRACE_S = 2.0


class RayWorker:
    """A running worker. See `amoe.cluster.launcher.WorkerHandle`.

    Args:
        actor: Ray's handle of the actor.
        ended: the result of its `run`.
        on_exit: called in the event loop when it has ended.
        on_kill: called once, when it is given up.
        give_back: called by `close`.
    """

    def __init__(
        self,
        rank: int,
        incarnation: int,
        title: str,
        actor: Any,
        where: Whereabouts,
        ended: asyncio.Future[int],
        channel: AsyncControlChannel,
        thread: RayThread,
        on_exit: Callable[[WorkerHandle], None],
        on_kill: Callable[[], None],
        give_back: Callable[[], None],
    ) -> None:
        self.rank = rank
        self.incarnation = incarnation
        self.title = title
        self.channel = channel
        self.exited = asyncio.Event()
        self.where = where
        self._actor = actor
        self._thread = thread
        self._on_exit = on_exit
        self._on_kill = on_kill
        self._give_back = give_back
        self._is_ready = False
        self._is_killed = False
        self._end = ""
        self._closing: asyncio.Task[None] | None = None
        self._watching = asyncio.create_task(self._watch(ended), name=f"amoe-actor-{rank}")

    async def wait_ready(self, on_loading: Callable[[WorkerHandle, Loading], None]) -> Ready:
        try:
            ready = await ready_message(self.channel, self.title, lambda message: on_loading(self, message))
        except ConfigError as error:  # of its own host, where a file may be missing that is here
            raise ConfigError(f"{self.describe()}: {error}") from error
        if ready is not None:
            self._is_ready = True
            return ready
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.exited.wait(), _EXIT_GRACE_S)
        raise EngineDeadError(f"{self.describe_exit()} while starting{self.describe_output()}")

    def seems_to_run(self) -> bool:
        """Nobody knows, from here."""
        return False

    def request_stop(self) -> None:
        """Ask it to leave. One that is not ready yet has nothing to finish, and does not listen: it is killed."""
        if not self._is_ready:
            self.kill()
        with contextlib.suppress(OSError):
            self.channel.send(Stop())

    def kill(self) -> None:
        """Have Ray end the actor; have its process killed by a task on its node as well, since one that is stopped
        would hear Ray only five seconds later. Nothing that it says from now on is heard."""
        if self.exited.is_set() or self._is_killed:
            return
        self._is_killed = True
        self._on_kill()
        self._thread.post(lambda: end_actor(self._actor))
        self._thread.post(lambda: _kill_there(self.where))
        self._closing = asyncio.create_task(self._fence())

    def describe(self) -> str:
        return f"{self.title} (pid {self.where.pid} on {self.where.host})"

    def describe_exit(self) -> str:
        return f"{self.describe()} {self._end or 'closed its control channel'}"

    def describe_output(self) -> str:
        """Ray keeps it."""
        return f"\n  | its output: `ray logs worker --node-ip {self.where.host} --pid {self.where.pid} --err`"

    async def close(self) -> None:
        self._watching.cancel()
        await asyncio.gather(self._watching, *([self._closing] if self._closing else []), return_exceptions=True)
        await self.channel.close()
        self._thread.post(lambda: end_actor(self._actor))  # one whose worker has left is still there
        self._give_back()

    async def _watch(self, ended: asyncio.Future[int]) -> None:
        try:
            status = await asyncio.shield(ended)
            self._exit(f"exited with status {status}")
        except RayError as error:
            self._exit(describe_death(error))

    async def _fence(self) -> None:
        self.channel.abort()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.exited.wait(), FENCE_S)
        self._exit("was killed, and its host has not confirmed it")

    def _exit(self, end: str) -> None:
        if not self.exited.is_set():
            self._end = end
            self.exited.set()
            self._on_exit(self)


def describe_death(error: RayError) -> str:
    """What has become of an actor, in few words."""
    text = str(error)
    if "node has died" in text or "node was terminated" in text or "node failure" in text:
        return "is lost with its node"
    if "ray.kill" in text:
        return "was killed"
    if "INTENDED" in text or "exit_actor" in text:
        return "was ended by Ray"
    if "died" in text:
        return "died: it was killed, or crashed"
    return f"failed: {text.strip().splitlines()[-1] if text.strip() else type(error).__name__}"


def end_actor(actor: Any) -> None:
    """For good: it is this server that starts the next one. Its name is free afterwards."""
    ray.kill(actor, no_restart=True)


def _kill_there(where: Whereabouts) -> None:
    strategy = NodeAffinitySchedulingStrategy(where.node_id, soft=False)
    task = ray.remote(kill_process).options(num_cpus=0, max_retries=0, scheduling_strategy=strategy)
    task.remote(where.pid, where.started)

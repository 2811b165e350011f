"""A connection to a Ray cluster: to one that runs, or to a new one on this host.

Ray's calls block, for up to minutes if a cluster does not answer, and install signal handlers if they are made in the
main thread: so all of them are made in one daemon thread, in which the event loop does not wait and whose end no exit
waits for.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before the import, which reads it: a server calls nobody

import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.services import find_bootstrap_address
from ray._private.state import available_resources_per_node  # its public sister adds the nodes up

from amoe.cluster.executor import split_ray_address
from amoe.cluster.leaving import RAY_THREAD
from amoe.cluster.ray_cluster.listeners import be_patient
from amoe.errors import ConfigError

logger = logging.getLogger(__name__)
T = TypeVar("T")

NAMESPACE = "amoe"
# What cannot work a user hears within half a minute: tests/unit/cluster/test_bounds.py adds these up, with others.
CONNECT_TIMEOUT_S = 4.0
INIT_TIMEOUT_S = 20.0
START_TIMEOUT_S = 120.0  # of a new one, on a busy host
CLOSE_TIMEOUT_S = 10.0
_LOG_LEVEL = "warning"


class RayThread:
    """Makes Ray's calls, one after the other."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=RAY_THREAD, daemon=True).start()

    async def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """What `function` returns; cancelling does not stop it, but nobody waits for it then."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            try:
                result = function(*args, **kwargs)
            except BaseException as error:
                self._tell(loop, done, None, error)
            else:
                self._tell(loop, done, result, None)

        self._calls.put(run)
        return await done

    def post(self, function: Callable[[], object]) -> None:
        """Call it, and do not wait; what it raises is logged."""

        def run() -> None:
            try:
                function()
            except Exception as error:
                logger.info("Ray: %s", error)

        self._calls.put(run)

    def close(self) -> None:
        """End the thread, after the calls before."""
        self._calls.put(_leave)

    def _run(self) -> None:
        while True:
            try:
                self._calls.get()()
            except _LeaveError:
                return

    @staticmethod
    def _tell(
        loop: asyncio.AbstractEventLoop, done: asyncio.Future[T], result: Any, error: BaseException | None
    ) -> None:
        def tell() -> None:
            if done.done():
                return
            if error is None:
                done.set_result(result)
            else:
                done.set_exception(error if isinstance(error, Exception) else RuntimeError(str(error)))

        try:
            loop.call_soon_threadsafe(tell)
        except RuntimeError:  # the loop has ended, and with it whoever waited
            logger.debug("nobody waits for a call of Ray's any more")


class _LeaveError(Exception):
    """The thread is to end."""


def _leave() -> None:
    raise _LeaveError


class RaySession:
    """A connection. Make it with `open`, end it with `close`.

    Args:
        is_ours: it ends with `close`; otherwise it is that of the actor that this process is.
        has_started: and with it the cluster, which this process has started.

    Attributes:
        thread: for whatever else is to be called.
        host: the address of this node as the cluster knows it.
    """

    def __init__(self, thread: RayThread, host: str, *, is_ours: bool, has_started: bool = False) -> None:
        self.thread = thread
        self.host = host
        self._is_ours = is_ours
        self._has_started = has_started
        self._is_gone = False

    @classmethod
    async def open(cls, address: str | None, local_cpus: int) -> RaySession:
        """Connect; inside of an actor, that is done already.

        Args:
            address: `HOST:PORT` of the head; None: what RAY_ADDRESS says, or else what `ray start` made here, or else a
                new cluster on this host, which ends with the session.
            local_cpus: logical processors of a new one.

        Raises:
            ConfigError: nobody answers at the address, or it cannot be used from here.
        """
        thread = RayThread()
        is_ours, has_started = not ray.is_initialized(), False
        try:
            if is_ours:
                has_started = await _connect(thread, address or os.environ.get("RAY_ADDRESS") or None, local_cpus)
            host = await thread.call(ray.util.get_node_ip_address)
            return cls(thread, host, is_ours=is_ours, has_started=has_started)
        except BaseException:
            thread.close()
            raise

    async def nodes(self) -> list[dict[str, Any]]:
        """Those that live, as `ray.nodes` tells them."""
        return [node for node in await self.thread.call(ray.nodes) if node["Alive"]]

    async def free_cpus(self) -> list[float]:
        """Logical processors of each node that nobody has reserved."""
        free = await self.thread.call(available_resources_per_node)
        return [resources.get("CPU", 0.0) for resources in free.values()]

    async def tidy(self, function: Callable[..., object], *args: Any) -> None:
        """Give something back before the end, for so long as Ray answers: what a cluster that is gone has kept is gone
        with it."""
        if self._is_gone:
            return
        try:
            await asyncio.wait_for(self.thread.call(function, *args), CLOSE_TIMEOUT_S)
        except TimeoutError:
            self._is_gone = True
            atexit.unregister(ray.shutdown)  # which would wait for the cluster once more
            what = "our Ray ends with this process" if self._has_started else "left as it is"
            logger.warning("the Ray cluster has not answered for %g s: %s", CLOSE_TIMEOUT_S, what)
        except Exception as error:
            logger.info("Ray: %s", error)

    async def close(self) -> None:
        """Leave the cluster; one of our own ends. Idempotent."""
        if self._is_ours:
            self._is_ours = False
            await self.tidy(ray.shutdown)
        self.thread.close()


def _is_worth_telling(record: logging.LogRecord) -> bool:
    """Ray's calls are not made in the main thread on purpose, see above."""
    return not record.getMessage().startswith("SIGTERM handler is not set")


async def _connect(thread: RayThread, address: str | None, local_cpus: int) -> bool:
    """Returns whether it was to a cluster that has been started for that."""
    running = await _running_here() if address is None else None
    if address == "local" or (address is None and running is None):
        await _start(thread, local_cpus)
        return True
    if running is not None:
        logger.info("using Ray at %s (found on this host)", running)
        # As Ray does for one that it has found by itself, and for no other: a cluster without tokens bears none.
        await thread.call(maybe_enable_token_auth_if_token_available, False)
    elif address != "auto":
        await _check_address(str(address))
    await _join(thread, running or str(address))
    return False


async def _join(thread: RayThread, address: str) -> None:
    """Become a driver of a cluster that runs.

    Raises:
        ConfigError: it will not have us.
    """
    try:
        await _init(thread, address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"Ray at {address} cannot be used from here: {error}. Start the server on a node of that cluster "
            "(`ray start --address=HEAD:6379`), with the Python and Ray of the others; and if it asks for a "
            "token, with that in ~/.ray/auth_token (or RAY_AUTH_TOKEN) and RAY_AUTH_MODE=token"
        ) from error


async def _running_here() -> str | None:
    """The cluster that `ray start` has made this host part of, as Ray remembers it; it may have ended long ago.

    Not any that runs on this host: `auto` would join those of other programs, and raises an error if there is none.
    """
    try:
        address = find_bootstrap_address(None)
    except OSError as error:
        logger.info("which Ray runs on this host cannot be read: %s", error)
        return None
    if not address:
        return None
    try:
        await _check_address(address)
    except ConfigError:
        logger.info("Ray remembers a cluster at %s, where nobody answers", address)
        return None
    return str(address)


async def _start(thread: RayThread, num_cpus: int) -> None:
    logger.info(
        "starting a Ray of our own on this host, which takes it for one of %d CPU (it has %d)",
        num_cpus,
        os.cpu_count() or 1,
    )
    await _init(thread, "local", START_TIMEOUT_S, num_cpus=num_cpus, include_dashboard=False)


async def _init(thread: RayThread, address: str, timeout_s: float = INIT_TIMEOUT_S, **options: Any) -> None:
    """`ray.init`, for so long as a user waits.

    Raises:
        ConfigError: it has not answered.
    """
    logging.getLogger("ray._private.worker").addFilter(_is_worth_telling)
    be_patient()
    call = thread.call(ray.init, address, namespace=NAMESPACE, logging_level=_LOG_LEVEL, **options)
    try:
        await asyncio.wait_for(call, timeout_s)
    except TimeoutError:
        raise ConfigError(
            f"Ray at {address} has not answered within {timeout_s:g} s: is this host one of its nodes (`ray start "
            f"--address={address}`), and does `ray status --address={address}` answer (what listens there may be "
            "something else than the head of a Ray cluster)?"
        ) from None


async def _check_address(address: str) -> None:
    """Ray itself would try for minutes, and then end the process.

    Raises:
        ConfigError: nobody listens there, or it can be no address.
    """
    host, port = split_ray_address(address)
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), CONNECT_TIMEOUT_S)
    except (OSError, TimeoutError) as error:
        reason = str(error) or f"no answer within {CONNECT_TIMEOUT_S:g} s"
        raise ConfigError(
            f"no Ray cluster answers at {address} ({reason}): is the head running (`ray start --head`), and is "
            "--ray-address (RAY_ADDRESS) its HOST:PORT?"
        ) from error
    writer.close()

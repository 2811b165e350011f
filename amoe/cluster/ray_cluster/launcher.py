"""Starts workers as actors of a Ray cluster."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from amoe.cluster import environment
from amoe.cluster.control_listener import ControlListener
from amoe.cluster.executor import ExecutorOptions
from amoe.cluster.launcher import WorkerHandle
from amoe.cluster.local import ring_bytes_for
from amoe.cluster.process import DEFAULT_ENTRY, LaunchSpec, title_of
from amoe.cluster.ray_cluster.actor import Whereabouts, WorkerActor, software
from amoe.cluster.ray_cluster.handle import RayWorker, describe_death, end_actor
from amoe.cluster.ray_cluster.names import claim
from amoe.cluster.ray_cluster.placement import Place, Room, needs_of, threads_for
from amoe.cluster.ray_cluster.reach import Acquaintances, Guest
from amoe.cluster.ray_cluster.session import NAMESPACE, RaySession
from amoe.config import EngineConfig
from amoe.engine.control import AsyncControlChannel
from amoe.engine.cpus import threads_per_worker
from amoe.engine.emulated_device import Shape
from amoe.engine.roles import role_of
from amoe.errors import ConfigError, EngineDeadError
from amoe.logs import LogOptions
from amoe.transport.opening import Fabric, create_fabric

logger = logging.getLogger(__name__)

_MODELLESS_BYTES = 1 << 20
TELL_AFTER_S = 10.0  # of waiting for an actor
START_TIMEOUT_S = 60.0  # for an actor in a bundle that is there, with a new process and amoe's imports


class RayLauncher:
    """See `amoe.cluster.launcher.Launcher`. Make it with `connect`.

    Args:
        session: closed by `close`.
        config: with the number of threads of each worker.
        entry: what makes a worker, see `LaunchSpec`.
        logs: how the workers log.
    """

    def __init__(
        self, session: RaySession, config: EngineConfig, options: ExecutorOptions, entry: str, logs: LogOptions
    ) -> None:
        self._session = session
        self._config = config
        self._options = options
        self._entry = entry
        self._logs = logs
        roles = {role_of(config, rank) for rank in range(config.placement.num_ranks)}
        threads = config.threads_per_worker or 1
        needs = {role: needs_of(config, role, threads, options.ray_pin_roles) for role in roles}
        self._needs = needs
        self._room = Room(session, config, options.deployment, needs, options.ray_placement_timeout_s)
        self._fabric: Fabric | None = None
        self._listener: ControlListener | None = None
        self._acquaintances = Acquaintances(config.placement)
        self._software = software()

    @classmethod
    async def connect(
        cls, config: EngineConfig, options: ExecutorOptions, *, entry: str = DEFAULT_ENTRY, logs: LogOptions
    ) -> RayLauncher:
        """Connect to the cluster.

        Raises:
            ConfigError: there is none, or it cannot be used from here.
        """
        placement = config.placement
        local_cpus = max(os.cpu_count() or 1, placement.num_ranks * threads_per_worker(config))
        session = await RaySession.open(options.ray_address, local_cpus)
        try:
            threads = threads_for(await session.free_cpus(), config)
            return cls(session, replace(config, threads_per_worker=threads), options, entry, logs)
        except BaseException:
            await session.close()
            raise

    async def prepare(self, shape: Shape | None) -> None:
        config = self._config
        try:
            self._listener = await ControlListener.open(self._session.host)
        except OSError as error:
            raise ConfigError(
                f"nothing can listen at {self._session.host}, which Ray takes for this host's address ({error}): is "
                "this host a node of the cluster (`ray start --address=HEAD:6379`)?"
            ) from error
        self._fabric = create_fabric(
            config.transport,
            num_ranks=config.placement.num_ranks,
            num_homes=len(config.placement.attention_ranks),
            max_record_bytes=_MODELLESS_BYTES if shape is None else ring_bytes_for(config, shape),
            host=self._session.host,
            link_timeout_s=config.failure.timeout_s,
        )
        await self._room.reserve()
        logger.info("the Ray cluster has room for %d worker(s), and starts them", config.placement.num_workers)

    async def launch(
        self, rank: int, incarnation: int, on_exit: Callable[[WorkerHandle], None], *, is_late: bool
    ) -> WorkerHandle:
        listener = self._listener
        assert listener is not None, "prepare comes first"
        place = await self._room.place_of(rank)
        control = listener.expect(rank, incarnation)
        actor: Any = None
        guest: Guest | None = None
        try:
            actor = await self._create(rank, place)
            where = await self._find(rank, actor)
            if where.port:
                guest = self._guest(rank, actor, where)
                await self._acquaintances.introduce(rank, guest)
            spec = LaunchSpec(
                config=self._config,
                rank=rank,
                entry=self._entry,
                control=control,
                transport=self._spec_for(where),
                incarnation=incarnation,
                is_late=is_late,
                logs=self._logs,
            )
            ended = await self._result(actor.run.remote, msgspec.json.encode(spec).decode())
            channel = await self._channel(rank, incarnation, ended, where)
        except BaseException:
            listener.forget(rank, incarnation)
            if actor is not None:
                self._session.thread.post(lambda: end_actor(actor))
            self._leave(rank, guest)
            raise
        title = title_of(self._config.placement, rank)
        logger.info("%s is pid %d on %s", title, where.pid, where.host)
        return RayWorker(
            rank,
            incarnation,
            title,
            actor,
            where,
            ended,
            channel,
            self._session.thread,
            on_exit,
            lambda: self._acquaintances.forget(rank, guest),
            lambda: self._leave(rank, guest),
        )

    async def close(self) -> None:
        if self._listener is not None:
            await self._listener.close()
        if self._fabric is not None:
            self._fabric.close()
        await self._room.close()
        await self._session.close()

    def _spec_for(self, where: Whereabouts) -> Any:
        assert self._fabric is not None
        # Ray shows each worker the one GPU that it has given to it.
        device = "cuda:0" if self._config.device.startswith("cuda") else "cpu"
        return self._fabric.spec_for(where.host, device)

    def _guest(self, rank: int, actor: Any, where: Whereabouts) -> Guest:
        async def reach(host: str, port: int) -> str:
            result = await self._result(actor.reach.remote, host, port)
            return str(await asyncio.shield(result))

        return Guest(title_of(self._config.placement, rank), where.host, where.port, reach)

    def _leave(self, rank: int, guest: Guest | None) -> None:
        self._acquaintances.forget(rank, guest)
        self._room.leave(rank)

    async def _create(self, rank: int, place: Place) -> Any:
        role = role_of(self._config, rank)
        name = f"amoe/{self._options.deployment}/{role}-{rank}"
        needs = dict(self._needs[role])
        variables = environment.remote(int(needs["CPU"]), os.environ)
        options = {
            "name": name,
            "namespace": NAMESPACE,
            "max_restarts": 0,  # the supervisor starts the next life, once it has seen to the end of this one
            "max_task_retries": 0,
            "max_concurrency": 2,
            "num_cpus": needs.pop("CPU"),
            "num_gpus": needs.pop("GPU", 0.0),
            "resources": needs,
            "runtime_env": {"env_vars": variables},
            "scheduling_strategy": PlacementGroupSchedulingStrategy(place.group, place.bundle),
        }
        actor_class = ray.remote(WorkerActor).options(**options)
        return await claim(self._session.thread, actor_class.remote, f"an actor {name}")

    async def _find(self, rank: int, actor: Any) -> Whereabouts:
        """Where Ray has put an actor, once it runs.

        Raises:
            ConfigError: it runs on other software than this process, or cannot run there.
            EngineDeadError: it does not start.
        """
        title = title_of(self._config.placement, rank)
        try:
            found = await self._result(actor.whereabouts.remote)
            where = await self._once_started(rank, found)
        except RayError as error:
            if "ModuleNotFoundError" in str(error) or "ImportError" in str(error):
                raise ConfigError(f"{title}: a node of the Ray cluster cannot import amoe: install it there") from error
            raise EngineDeadError(f"{title} {describe_death(error)} while Ray started it") from error
        for name, version in self._software.items():
            if where.software.get(name) != version:
                raise ConfigError(
                    f"{title}: node {where.host} has {name} {where.software.get(name)}, the server has {version}: "
                    "install the same on every node"
                )
        return where

    async def _once_started(self, rank: int, found: asyncio.Future[Whereabouts]) -> Whereabouts:
        """What an actor says first.

        Raises:
            EngineDeadError: Ray has not started it in time; the message says what it needs and what there is.
        """
        waits = f"{title_of(self._config.placement, rank)}: Ray has not started its actor"
        try:
            return await asyncio.wait_for(asyncio.shield(found), TELL_AFTER_S)
        except TimeoutError:
            logger.warning("%s for %g s: %s", waits, TELL_AFTER_S, await self._room.shortage(rank))
        try:
            return await asyncio.wait_for(asyncio.shield(found), START_TIMEOUT_S - TELL_AFTER_S)
        except TimeoutError:
            shortage = await self._room.shortage(rank)
            raise EngineDeadError(f"{waits} within {START_TIMEOUT_S:g} s: {shortage}") from None

    async def _result(self, method: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """What a method of an actor will return. Ray completes it, so nobody may cancel it: see `asyncio.shield`."""
        reference = await self._session.thread.call(method, *args)
        future = asyncio.wrap_future(reference.future())
        future.add_done_callback(lambda done: done.cancelled() or done.exception())  # somebody may have lost interest
        return future

    async def _channel(
        self, rank: int, incarnation: int, ended: asyncio.Future[int], where: Whereabouts
    ) -> AsyncControlChannel:
        """Its control channel, once it has connected, or why it has not.

        Raises:
            EngineDeadError: it has ended before.
        """
        assert self._listener is not None
        connected = asyncio.ensure_future(self._listener.channel(rank, incarnation))
        try:
            await asyncio.wait((connected, ended), timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            if connected.done():
                return connected.result()
        finally:
            connected.cancel()
            await asyncio.gather(connected, return_exceptions=True)
        who = f"{title_of(self._config.placement, rank)} (pid {where.pid} on {where.host})"
        if not ended.done():
            raise EngineDeadError(f"{who} has not connected within {START_TIMEOUT_S:g} s")
        error = ended.exception()
        how = describe_death(error) if isinstance(error, RayError) else f"ended: {error or ended.result()}"
        raise EngineDeadError(f"{who} {how}, before it reached the server")

"""The workers of one host, as child processes: started together, watched, and gone when their parent is gone.

No worker outlives the parent, however that ends: the kernel kills each when the thread that started it ends, and the
end of its control socket is a `Stop`. Start a cluster from a thread that lives as long as the cluster shall. Nothing
has a name in the file system, so nothing can be left there.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from amoe.cluster.worker_process import WorkerProcess
from amoe.config import EngineConfig
from amoe.engine.control import AsyncControlChannel
from amoe.engine.emulated_device import Shape, emulated_device, served_shape
from amoe.engine.expert_placement import expert_owners, placement_digest
from amoe.engine.messages import Loading, Ready
from amoe.errors import ConfigError
from amoe.logs import LogOptions
from amoe.profiles.models import ModelSizes
from amoe.transport.shm import ShmFabric
from amoe.transport.wire import max_record_bytes
from amoe.types import Int16Array

logger = logging.getLogger(__name__)

DEFAULT_ENTRY = "amoe.engine.build:build_worker"
_LARGEST_ITEM_BYTES = 4
_EMULATED_ITEM_BYTES = 2  # they send bfloat16, and there may be hundreds of rings


def ring_bytes_for(config: EngineConfig, model: Shape) -> int:
    """Bytes of the ring between two workers: all tokens that a home may have in flight, in one batch, in float32.

    A batch therefore never is too large, and in 16 bits two of the largest fit. Only pages that are used are allocated.
    """
    num_tokens = config.scheduler.num_token_slots
    item_bytes = _LARGEST_ITEM_BYTES if emulated_device(config) is None else _EMULATED_ITEM_BYTES
    pairs = config.capacity.pairs_per_token(model.top_k, model.num_experts)
    return max_record_bytes(num_tokens, model.hidden_size, pairs, item_bytes)


class LocalCluster:
    """One process per worker of `config`. Use it in one event loop: `start`, then `stop`.

    Args:
        entry: what makes a worker, see `LaunchSpec`.
        ring_bytes: capacity of each ring; None derives it from the checkpoint.
        on_death: called in the event loop with rank and reason when a worker ends that was started and not stopped.
        logs: how the workers log.
        num_fronts: API processes that will talk to the workers themselves; none: this process does.

    Attributes:
        channels: the control channel of each worker, by rank, once `start` has been called.
        owners: [num_layers, num_experts, R] where experts live, once `start` has been called; None: not known.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        entry: str = DEFAULT_ENTRY,
        ring_bytes: int | None = None,
        on_death: Callable[[int, str], None] | None = None,
        logs: LogOptions | None = None,
        num_fronts: int = 0,
    ) -> None:
        self.config = config
        self.on_death = on_death
        self.owners: Int16Array | None = None
        self._entry = entry
        self._num_fronts = num_fronts
        self._logs = logs or LogOptions()
        self._ring_bytes = ring_bytes
        self._fabric: ShmFabric | None = None
        self._workers: list[WorkerProcess] = []
        self._is_started = False
        self._is_stopping = False
        self._is_killed = False
        self._stop_lock = asyncio.Lock()

    @property
    def channels(self) -> list[AsyncControlChannel]:
        return [worker.channel for worker in self._workers]

    def front_sockets(self, front: int) -> list[socket.socket]:
        """The ends of the workers' channels, by rank, for API process number `front`."""
        return [worker.front_sockets[front] for worker in self._workers]

    @property
    def all_alive(self) -> bool:
        """No worker has ended."""
        return not any(worker.exited.is_set() for worker in self._workers)

    @property
    def pids(self) -> list[int]:
        """Process ids by rank."""
        return [worker.pid for worker in self._workers]

    async def start(self, on_progress: Callable[[int, int], None] | None = None) -> list[Ready]:
        """Start all workers and wait until each is ready. If one fails, all are stopped again.

        Args:
            on_progress: called with the loaded bytes and all bytes, summed over the workers that have said so far.

        Returns:
            What each worker said, by rank.

        Raises:
            ConfigError, CheckpointError: it cannot work; the message is for the user.
            EngineDeadError: a worker failed or died.
        """
        loaded: dict[int, Loading] = {}

        def on_loading(worker: WorkerProcess, message: Loading) -> None:
            loaded[worker.rank] = message
            if on_progress is not None:
                on_progress(sum(m.done for m in loaded.values()), sum(m.total for m in loaded.values()))

        try:
            await self._spawn()
            ready = await _all_or_first_error([worker.wait_ready(on_loading) for worker in self._workers])
            self._check_placement(ready)
        except BaseException:
            self.kill()
            await self.stop(0)
            raise
        self._is_started = True
        for worker in self._workers:
            self._report_death(worker)  # between its readiness and now
        return ready

    async def stop(self, grace_s: float = 10.0) -> None:
        """Ask all workers to leave, kill those that have not left after `grace_s` seconds, give everything back.

        Idempotent. Requests should have been drained before.
        """
        self._is_stopping = True
        async with self._stop_lock:
            for worker in self._workers:
                worker.request_stop()
            exits = [asyncio.create_task(worker.exited.wait()) for worker in self._workers]
            if exits:
                await asyncio.wait(exits, timeout=grace_s)
            for worker in self._workers:
                if not worker.exited.is_set():
                    if not self._is_killed:
                        logger.warning(
                            "%s (pid %d) did not leave within %g s: killed", worker.title, worker.pid, grace_s
                        )
                    worker.kill()
            await asyncio.gather(*exits)
            await asyncio.gather(*(worker.close() for worker in self._workers))
            self._workers.clear()
            if self._fabric is not None:
                self._fabric.close()

    def kill(self) -> None:
        """SIGKILL to all workers, now. `stop` still has to be called, unless the process ends."""
        self._is_stopping = self._is_killed = True
        for worker in self._workers:
            worker.kill()

    async def _spawn(self) -> None:
        placement = self.config.placement
        if self._ring_bytes is None:
            model = served_shape(self.config)
            if (device := emulated_device(self.config)) is not None and isinstance(model, ModelSizes):
                logger.info("%s", device.describe(model))
            self.owners = expert_owners(self.config, model)  # refused before it costs
            self._ring_bytes = ring_bytes_for(self.config, model)
        ring_bytes, num_workers = self._ring_bytes, placement.num_workers
        self._fabric = ShmFabric.create(num_workers, ring_bytes)
        for rank in range(num_workers):
            worker = await WorkerProcess.spawn(
                self.config, rank, self._fabric, self._entry, self._report_death, self._logs, self._num_fronts
            )
            self._workers.append(worker)

    def _check_placement(self, ready: list[Ready]) -> None:
        """Workers that disagree on where experts live would compute wrong tokens."""
        if self.owners is not None and {item.placement_digest for item in ready} != {placement_digest(self.owners)}:
            raise ConfigError("the file of --expert-load has changed while the workers were reading it: start again")

    def _report_death(self, worker: WorkerProcess) -> None:
        if self._is_started and not self._is_stopping and worker.exited.is_set() and self.on_death is not None:
            self.on_death(worker.rank, worker.describe_exit())


async def _all_or_first_error(waits: list[Coroutine[Any, Any, Ready]]) -> list[Ready]:
    """All results; if any fails, the others are cancelled, and an error for the user goes before any other."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        errors = [task.exception() for task in tasks if task.done()]
        failures = [error for error in errors if error is not None]
        if failures:
            raise next((error for error in failures if isinstance(error, ConfigError)), failures[0])
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

"""The workers of a server, whatever starts them: started together, replaced one by one, and gone in the end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from amoe.cluster.launcher import Launcher, WorkerHandle
from amoe.cluster.patience import ready_in_time
from amoe.config import EngineConfig
from amoe.engine.control import AsyncControlChannel
from amoe.engine.emulated_device import Shape, emulated_device, served_shape
from amoe.engine.expert_placement import expert_owners, placement_digest
from amoe.engine.messages import Loading, Ready
from amoe.errors import ConfigError, EngineDeadError
from amoe.profiles.models import ModelSizes
from amoe.types import Int16Array

logger = logging.getLogger(__name__)

START_SILENCE_S = 180.0  # longer than for a late one: the machine has read neither Python's packages nor the model yet
KILL_GRACE_S = 10.0  # then one that was killed is left behind, and said so


class WorkerCluster:
    """One worker per rank of `config`. Use it in one event loop: `start`, then `stop`.

    Args:
        launcher: starts them; this cluster's own, closed by `stop`.
        has_model: the workers serve `config.model`; False: they have none (tests).
        on_death: called in the event loop with rank and reason when a worker ends that was started and not stopped.

    Attributes:
        workers: the present life of each, by rank.
        owners: [num_layers, num_experts, R] where experts live at the start, once `start` has been called; None: not
            known.
        shape: of the model, likewise.
    """

    def __init__(
        self,
        config: EngineConfig,
        launcher: Launcher,
        *,
        has_model: bool = True,
        on_death: Callable[[int, str], None] | None = None,
    ) -> None:
        self.config = config
        self.on_death = on_death
        self.owners: Int16Array | None = None
        self.shape: Shape | None = None
        self.workers: dict[int, WorkerHandle] = {}
        self._launcher = launcher
        self._has_model = has_model
        self._is_started = False
        self._is_stopping = False
        self._is_killed = False
        self._checkpoint_digest = 0
        self._longest = 0  # tokens of a sequence
        self._stop_lock = asyncio.Lock()

    @property
    def channels(self) -> list[AsyncControlChannel]:
        """The control channel of each worker, by rank."""
        return [self.workers[rank].channel for rank in sorted(self.workers)]

    @property
    def all_alive(self) -> bool:
        """No worker has ended."""
        return not any(worker.exited.is_set() for worker in self.workers.values())

    async def start(self, on_progress: Callable[[int, int], None] | None = None) -> list[Ready]:
        """Start all workers and wait until each is ready. If one fails, all are stopped again.

        Args:
            on_progress: called with the loaded bytes and all bytes, summed over the workers that have said so far.

        Returns:
            What each worker said, by rank.

        Raises:
            ConfigError, CheckpointError: it cannot work; the message is for the user.
            EngineDeadError: a worker failed, died, or hangs.
        """
        loaded: dict[int, Loading] = {}

        def on_loading(worker: WorkerHandle, message: Loading) -> None:
            loaded[worker.rank] = message
            if on_progress is not None:
                on_progress(sum(m.done for m in loaded.values()), sum(m.total for m in loaded.values()))

        async def start_one(rank: int) -> Ready:
            worker = await self.launch(rank, 0, is_late=False)
            return await ready_in_time(worker, START_SILENCE_S, on_loading)

        try:
            self._read_model()
            await self._launcher.prepare(self.shape)
            ready = await _all_or_first_error([start_one(rank) for rank in range(self.config.placement.num_workers)])
            self._check_placement(ready)
            self._check_checkpoints(ready)
            self._longest = longest_sequence(self.config, ready)
        except BaseException:
            self.kill()
            await self.stop(0)
            raise
        self._is_started = True
        for worker in list(self.workers.values()):
            self._report_death(worker)  # between its readiness and now
        return ready

    async def launch(self, rank: int, incarnation: int, *, is_late: bool = True) -> WorkerHandle:
        """Start a worker; whoever was at that rank must have been given to `retire`.

        Raises:
            ConfigError: there is no room for it.
            EngineDeadError: the cluster is being stopped.
        """
        if self._is_stopping:
            raise EngineDeadError("the cluster is being stopped")
        if rank in self.workers:
            raise ValueError(f"rank {rank} is still taken by {self.workers[rank].describe()}")
        worker = await self._launcher.launch(rank, incarnation, self._report_death, is_late=is_late)
        self.workers[rank] = worker
        if self._is_stopping:
            worker.kill()
        return worker

    async def retire(self, worker: WorkerHandle) -> None:
        """End a worker for good and give all of it back: its rank is free afterwards. Never are there two at one."""
        worker.kill()
        await worker.exited.wait()
        await worker.close()
        if self.workers.get(worker.rank) is worker:
            del self.workers[worker.rank]

    def check_late(self, worker: WorkerHandle, ready: Ready) -> None:
        """Whether a worker that was started anew serves the same model as the others, and as long sequences.

        Raises:
            ConfigError: it does not; the message names it.
        """
        if worker.rank in self.config.placement.attention_ranks and ready.max_model_len < self._longest:
            raise ConfigError(
                f"{worker.describe()} has memory for sequences of {ready.max_model_len} tokens now, and the server "
                f"takes {self._longest}: free memory there, or fix it with --kv-cache-memory-bytes"
            )
        if self._checkpoint_digest and ready.checkpoint_digest not in (0, self._checkpoint_digest):
            raise ConfigError(
                f"{worker.describe()} has read another model than the others: {self.config.model} changed"
            )

    async def stop(self, grace_s: float = 10.0) -> None:
        """Ask all workers to leave, kill those that have not left after `grace_s` seconds, give everything back.

        Idempotent. Requests should have been drained before, and whoever replaces workers has been stopped.
        """
        self._is_stopping = True
        async with self._stop_lock:
            workers = list(self.workers.values())
            for worker in workers:
                worker.request_stop()
            exits = [asyncio.create_task(worker.exited.wait()) for worker in workers]
            if exits:
                await asyncio.wait(exits, timeout=grace_s)
            for worker in workers:
                if not worker.exited.is_set():
                    if not self._is_killed:
                        logger.warning("%s did not leave within %g s: killed", worker.describe(), grace_s)
                    worker.kill()
            if exits:
                await asyncio.wait(exits, timeout=KILL_GRACE_S)
            for worker, gone in zip(workers, exits, strict=True):
                if not gone.done():  # it waits for a disk, say
                    logger.error("%s does not end although it was killed: it is left behind", worker.describe())
                    gone.cancel()
            await asyncio.gather(*(worker.close() for worker in workers))
            self.workers.clear()
            await self._launcher.close()

    def kill(self) -> None:
        """End all workers, now. `stop` still has to be called, unless the process ends."""
        self._is_stopping = self._is_killed = True
        for worker in self.workers.values():
            worker.kill()

    def _read_model(self) -> None:
        """What is wrong with it is refused before it costs."""
        if not self._has_model:
            return
        self.shape = served_shape(self.config)
        if (device := emulated_device(self.config)) is not None and isinstance(self.shape, ModelSizes):
            logger.info("%s", device.describe(self.shape))
        self.owners = expert_owners(self.config, self.shape)

    def _check_placement(self, ready: list[Ready]) -> None:
        """Workers that disagree on where experts live would compute wrong tokens."""
        if self.owners is not None and {item.placement_digest for item in ready} != {placement_digest(self.owners)}:
            raise ConfigError("the file of --expert-load has changed while the workers were reading it: start again")

    def _check_checkpoints(self, ready: list[Ready]) -> None:
        """So would workers that have read different models: each reads what lies on its own host."""
        first = ready[0].checkpoint_digest
        others = [self.workers[rank].describe() for rank, item in enumerate(ready) if item.checkpoint_digest != first]
        if others:
            raise ConfigError(
                f"{self.config.model} is another model at {', '.join(others)} than at {self.workers[0].describe()}: "
                "put the same files on every host"
            )
        self._checkpoint_digest = first

    def _report_death(self, worker: WorkerHandle) -> None:
        if self._is_started and not self._is_stopping and worker.exited.is_set() and self.on_death is not None:
            self.on_death(worker.rank, worker.describe_exit())


def longest_sequence(config: EngineConfig, ready: Sequence[Ready]) -> int:
    """Tokens that every attention worker has room for. Expert workers have no say: they have no KV cache."""
    return min(ready[rank].max_model_len for rank in config.placement.attention_ranks)


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

"""The workers of one host, as child processes: started together, watched, and gone when their parent is gone.

No worker outlives the parent, however that ends: the kernel kills each when the thread that started it ends, and the
end of its control socket is a `Stop`. Start a cluster from a thread that lives as long as the cluster shall. Nothing
has a name in the file system, so nothing can be left there.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import cast

from amoe.cluster.cluster import WorkerCluster
from amoe.cluster.launcher import WorkerHandle
from amoe.cluster.process import DEFAULT_ENTRY, InheritedControl, LaunchSpec
from amoe.cluster.spare import SpareProcess
from amoe.cluster.worker_process import WorkerProcess, start_process
from amoe.config import EngineConfig
from amoe.engine.emulated_device import Shape, emulated_device
from amoe.logs import LogOptions
from amoe.transport.opening import Fabric, create_fabric
from amoe.transport.record_size import max_record_bytes

SPARE_DELAY_S = 5.0  # after a worker was started: until then the processor has better things to do
_LARGEST_ITEM_BYTES = 4
_EMULATED_ITEM_BYTES = 2  # they send bfloat16, and there may be hundreds of rings
_HOST = "127.0.0.1"
_MODELLESS_RING_BYTES = 1 << 20


def ring_bytes_for(config: EngineConfig, model: Shape) -> int:
    """Bytes of the ring between two workers: all tokens that a home may have in flight, in one batch, in float32.

    A batch therefore never is too large, and in 16 bits two of the largest fit. Only pages that are used are allocated.
    """
    num_tokens = config.scheduler.num_token_slots
    item_bytes = _LARGEST_ITEM_BYTES if emulated_device(config) is None else _EMULATED_ITEM_BYTES
    pairs = config.capacity.pairs_per_token(model.top_k, model.num_experts)
    return max_record_bytes(num_tokens, model.hidden_size, pairs, item_bytes)


class LocalLauncher:
    """Starts workers as processes of this host. See `amoe.cluster.launcher.Launcher`.

    Args:
        entry: what makes a worker, see `LaunchSpec`.
        ring_bytes: capacity of each ring; None derives it from the model.
        logs: how the workers log.
        with_doors: API processes will talk to the workers themselves; otherwise this process does.
    """

    def __init__(
        self, config: EngineConfig, *, entry: str, ring_bytes: int | None, logs: LogOptions, with_doors: bool
    ) -> None:
        self._config = config
        self._entry = entry
        self._ring_bytes = ring_bytes
        self._logs = logs
        self._with_doors = with_doors
        self._fabric: Fabric | None = None
        self._spare: SpareProcess | None = None
        self._spare_timer: asyncio.TimerHandle | None = None

    async def prepare(self, shape: Shape | None) -> None:
        ring_bytes = self._ring_bytes
        if ring_bytes is None:
            ring_bytes = _MODELLESS_RING_BYTES if shape is None else ring_bytes_for(self._config, shape)
        placement = self._config.placement
        self._fabric = create_fabric(
            self._config.transport,
            num_ranks=placement.num_ranks,
            num_homes=len(placement.attention_ranks),
            max_record_bytes=ring_bytes,
            link_timeout_s=self._config.failure.timeout_s,
        )

    async def launch(
        self, rank: int, incarnation: int, on_exit: Callable[[WorkerHandle], None], *, is_late: bool
    ) -> WorkerHandle:
        fabric = self._fabric
        assert fabric is not None, "prepare comes first"

        def make_spec(control: InheritedControl) -> LaunchSpec:
            return LaunchSpec(
                config=self._config,
                rank=rank,
                entry=self._entry,
                control=control,
                transport=fabric.spec_for(_HOST, self._device(rank)),
                incarnation=incarnation,
                is_late=is_late,
                logs=self._logs,
            )

        self._plan_spare()
        spare, self._spare = self._spare, None
        if spare is not None:
            with contextlib.suppress(OSError):
                return await WorkerProcess.adopt(spare, make_spec, on_exit)
        return await WorkerProcess.spawn(make_spec, fabric.fds(), on_exit, with_door=self._with_doors)

    def _plan_spare(self) -> None:
        """Have a spare process soon, but not while workers are being started."""
        if self._config.failure.warm_spare:
            if self._spare_timer is not None:
                self._spare_timer.cancel()
            self._spare_timer = asyncio.get_running_loop().call_later(SPARE_DELAY_S, self._start_spare)

    def _start_spare(self) -> None:
        config, fabric = self._config, self._fabric
        if self._spare is None and fabric is not None:
            self._spare = SpareProcess(
                lambda fds: start_process(config, "spare", (*fds, *fabric.fds())), with_door=self._with_doors
            )

    async def close(self) -> None:
        if self._spare_timer is not None:
            self._spare_timer.cancel()
        if self._spare is not None:
            self._spare.close()
            self._spare = None
        if self._fabric is not None:
            self._fabric.close()

    def _device(self, rank: int) -> str:
        """Of its payloads."""
        device = self._config.device
        if not device.startswith("cuda"):
            return "cpu"
        from amoe.engine.devices import resolve_device  # late: a server of workers on CPUs needs no torch

        return str(resolve_device(device, rank))


class LocalCluster(WorkerCluster):
    """One process per worker of `config`. Use it in one event loop: `start`, then `stop`.

    Args:
        entry: what makes a worker, see `LaunchSpec`.
        ring_bytes: capacity of each ring; None derives it from the checkpoint.
        on_death: see `WorkerCluster`.
        logs: how the workers log.
        with_doors: API processes will talk to the workers themselves; otherwise this process does.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        entry: str = DEFAULT_ENTRY,
        ring_bytes: int | None = None,
        on_death: Callable[[int, str], None] | None = None,
        logs: LogOptions | None = None,
        with_doors: bool = False,
    ) -> None:
        launcher = LocalLauncher(
            config, entry=entry, ring_bytes=ring_bytes, logs=logs or LogOptions(), with_doors=with_doors
        )
        super().__init__(config, launcher, has_model=ring_bytes is None, on_death=on_death)

    def let_in(self, front: int, rank: int) -> socket.socket:
        """Connect API process number `front` with the worker of a rank: see `WorkerProcess.let_in`."""
        return cast(WorkerProcess, self.workers[rank]).let_in(front)

    @property
    def pids(self) -> list[int]:
        """Process ids by rank."""
        return [worker.pid for worker in self._processes]

    @property
    def _processes(self) -> list[WorkerProcess]:
        return [cast(WorkerProcess, self.workers[rank]) for rank in sorted(self.workers)]

"""Waiting for a worker that starts, as long as it gets on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from amoe.cluster.launcher import WorkerHandle
from amoe.engine.messages import Loading, Ready
from amoe.errors import EngineDeadError


async def ready_in_time(
    worker: WorkerHandle, silence_s: float, on_loading: Callable[[WorkerHandle, Loading], None]
) -> Ready:
    """`WorkerHandle.wait_ready`, but one that says nothing for so long will never be ready: a disk of another host that
    does not answer, or a process that somebody has stopped.

    Raises:
        ConfigError: it cannot start; the message is for the user.
        EngineDeadError: it failed, died, or said nothing.
    """
    loop = asyncio.get_running_loop()

    def on_progress(worker: WorkerHandle, message: Loading) -> None:
        patience.reschedule(loop.time() + silence_s)
        on_loading(worker, message)

    try:
        async with asyncio.timeout(silence_s) as patience:
            return await worker.wait_ready(on_progress)
    except TimeoutError as error:
        raise EngineDeadError(
            f"{worker.describe()} has said nothing for {silence_s:g} s while starting{worker.describe_output()}"
        ) from error

"""A cluster of workers wherever they are to run, and what is told there of the server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from amoe.cluster.cluster import WorkerCluster
from amoe.cluster.executor import ExecutorOptions
from amoe.cluster.local import LocalCluster
from amoe.cluster.process import DEFAULT_ENTRY
from amoe.config import EngineConfig
from amoe.errors import ConfigError
from amoe.logs import LogOptions


async def open_cluster(
    config: EngineConfig,
    executor: ExecutorOptions,
    *,
    entry: str = DEFAULT_ENTRY,
    logs: LogOptions | None = None,
    with_doors: bool = False,
) -> WorkerCluster:
    """A cluster that is yet to be started, and must be stopped. Install signal handlers only afterwards: Ray takes
    SIGTERM for itself when it is connected to.

    Args:
        entry: what makes a worker, see `LaunchSpec`.
        logs: how the workers log.
        with_doors: API processes of this host will talk to the workers themselves; otherwise this process does.

    Raises:
        ConfigError: the Ray cluster cannot be used.
    """
    if executor.name == "local":
        return LocalCluster(config, entry=entry, logs=logs, with_doors=with_doors)
    try:
        from amoe.cluster.ray_cluster import RayLauncher  # late: it takes a second, and may not be installed
    except ModuleNotFoundError as error:
        raise ConfigError(f"--executor ray needs Ray ({error}): pip install 'amoe[ray]'") from error
    launcher = await RayLauncher.connect(config, executor, entry=entry, logs=logs or LogOptions())
    return WorkerCluster(config, launcher)


@contextlib.asynccontextmanager
async def told_metrics(executor: ExecutorOptions, collect: Callable[[], Iterable[Any]]) -> AsyncIterator[None]:
    """Meanwhile, Ray has a copy of the server's metrics, if it has the workers.

    Args:
        collect: of a registry of prometheus_client's.
    """
    if executor.name == "local":
        yield
        return
    from amoe.cluster.ray_cluster.metrics import copy_metrics

    copying = asyncio.create_task(copy_metrics(collect), name="amoe-ray-metrics")
    try:
        yield
    finally:
        copying.cancel()
        await asyncio.gather(copying, return_exceptions=True)

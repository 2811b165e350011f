"""A stand-in for the server's process: a cluster of fake workers, and the signals that end it.

Usage: cluster_parent.py MODE. Prints `loading` or `ready` with the workers' pids; `stopped` after an orderly stop.
"""

from __future__ import annotations

import asyncio
import sys

from amoe.cluster.local import LocalCluster
from amoe.cluster.shutdown import ShutdownSignals
from amoe.config import EngineConfig, PlacementConfig


async def main() -> None:
    config = EngineConfig(model=sys.argv[1], placement=PlacementConfig(attention_workers=1, expert_workers=1))
    cluster = LocalCluster(config, entry="fake_worker:build_worker", ring_bytes=1 << 20)
    signals = ShutdownSignals(cluster.kill)
    signals.install()

    def on_progress(done: int, total: int) -> None:
        if total == 200:
            print("loading", *cluster.pids, flush=True)

    await cluster.start(on_progress)
    print("ready", *cluster.pids, flush=True)
    await signals.requested.wait()
    print("draining", flush=True)
    await cluster.stop(600 if config.model == "deaf" else 30)
    print("stopped", flush=True)


asyncio.run(main())

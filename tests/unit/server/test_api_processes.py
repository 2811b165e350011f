"""The parent of several API processes, without any."""

from __future__ import annotations

import asyncio
import gc
from types import SimpleNamespace
from typing import Any, cast

from amoe.cluster.local import LocalCluster
from amoe.engine.async_engine import ModelInfo
from amoe.logs import LogOptions
from amoe.server.api_processes import ApiProcesses
from amoe.server.options import ServerOptions


async def test_one_that_goes_before_all_listen():
    loop, complaints = asyncio.get_running_loop(), []
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    model = ModelInfo(name="m", max_model_len=8, vocab_size=8)
    processes = ApiProcesses(cast(LocalCluster, None), ServerOptions(model_names=("m",)), model, LogOptions())
    streams = [asyncio.StreamReader(), asyncio.StreamReader()]
    processes._processes = cast(Any, [SimpleNamespace(stdout=stream) for stream in streams])

    async def exit_now() -> int:
        return 1

    streams[0].feed_data(b"listening\n")
    assert not await processes._all_listen([asyncio.create_task(exit_now())])
    for _ in range(5):  # until what was cancelled has ended
        await asyncio.sleep(0)
    gc.collect()
    assert not complaints

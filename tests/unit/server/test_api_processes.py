"""The parent of several API processes, without any: who is started anew, and when the server leaves."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from amoe.config import EngineConfig, FailureConfig
from amoe.engine.async_engine import ModelInfo
from amoe.logs import LogOptions
from amoe.server.api_processes import ApiProcesses
from amoe.server.options import ServerOptions

FAILURE = FailureConfig(backoff_s=0.001, max_backoff_s=600.0, max_crashes=3)


class FakeProcesses(ApiProcesses):
    """Lives that begin to listen at once, unless told otherwise, and end when a test says so.

    Attributes:
        lives: [place index] of each that has begun; its event ends it.
    """

    def __init__(self, *, supervised: bool = True) -> None:
        self.fronts = SimpleNamespace(died=asyncio.Event())
        super().__init__(
            EngineConfig(model="m", failure=FAILURE),
            cast(Any, self.fronts),
            cast(Any, object()) if supervised else None,
            ServerOptions(model_names=("m",), api_server_count=2, shutdown_timeout_s=0.0),
            ModelInfo(name="m", max_model_len=8, vocab_size=8),
            LogOptions(),
        )
        self.lives: list[tuple[int, asyncio.Event]] = []
        self.listens = True
        self.came = asyncio.Condition()

    async def _live(self, place: Any, listener_fd: int, directory: str) -> str:
        end = asyncio.Event()
        self.lives.append((place.index, end))
        place.process = SimpleNamespace(returncode=None, send_signal=lambda _: end.set())
        place.listening.clear()
        if self.listens:
            place.listening.set()
        async with self.came:
            self.came.notify_all()
        await end.wait()
        place.process.returncode = 0
        return f"API process {place.index} was killed"

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(30), self.came:
            await self.came.wait_for(holds)


@contextlib.asynccontextmanager
async def running(processes: FakeProcesses) -> AsyncIterator[SimpleNamespace]:
    """`run` in the background: its task, and the events around it."""
    now = SimpleNamespace(requested=asyncio.Event(), listening=asyncio.Event())
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")  # no name in any file system
        now.task = asyncio.create_task(processes.run(listener, now.requested, now.listening.set))
        try:
            yield now
        finally:
            now.requested.set()
            await now.task


async def test_it_serves_until_it_is_told_to_leave():
    processes = FakeProcesses()
    async with running(processes) as now:
        await now.listening.wait()
        assert [index for index, _ in processes.lives] == [0, 1]
        now.requested.set()
        assert await now.task == 0


async def test_one_that_dies_is_started_anew_alone():
    processes = FakeProcesses()
    async with running(processes) as now:
        await now.listening.wait()
        processes.lives[1][1].set()
        await processes.until(lambda: len(processes.lives) == 3)
        assert [index for index, _ in processes.lives] == [0, 1, 1]
        now.requested.set()
        assert await now.task == 0, "how a former life has ended is no failure of the server"


async def test_one_that_dies_again_and_again_ends_the_server(capsys: pytest.CaptureFixture[str]):
    processes = FakeProcesses()
    async with running(processes) as now:
        for count in range(FAILURE.max_crashes):
            await processes.until(lambda count=count: len(processes.lives) == 2 + count)
            processes.lives[-1][1].set()
        assert await now.task == 1
    assert len(processes.lives) == 1 + FAILURE.max_crashes
    assert "API process 1 was killed" in capsys.readouterr().err


async def test_one_that_never_listens_ends_the_start():
    processes = FakeProcesses()
    processes.listens = False
    async with running(processes) as now:
        await processes.until(lambda: len(processes.lives) == 2)
        processes.lives[0][1].set()
        assert await now.task == 1
        assert not now.listening.is_set()
    assert len(processes.lives) == 2


async def test_where_nobody_replaces_workers_one_that_dies_ends_the_server():
    processes = FakeProcesses(supervised=False)
    async with running(processes) as now:
        await now.listening.wait()
        processes.lives[0][1].set()
        assert await now.task == 1
    assert len(processes.lives) == 2


async def test_when_nothing_can_go_on_they_leave_by_themselves():
    processes = FakeProcesses()
    async with running(processes) as now:
        await now.listening.wait()
        processes.fronts.died.set()
        for _, end in processes.lives:
            end.set()
        assert await now.task == 1
    assert len(processes.lives) == 2

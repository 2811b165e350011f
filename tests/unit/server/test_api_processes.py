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
    """Lives that begin to listen at once, unless told otherwise, and end when a test or a signal says so.

    Attributes:
        lives: place index of each that has begun; its future ends it, with the exit status.
        failures: with which the next ones cannot be started.
    """

    def __init__(self, *, supervised: bool = True, failure: FailureConfig = FAILURE) -> None:
        self.fronts = SimpleNamespace(died=asyncio.Event())
        super().__init__(
            EngineConfig(model="m", failure=failure),
            cast(Any, self.fronts),
            cast(Any, object()) if supervised else None,
            ServerOptions(model_names=("m",), api_server_count=2, shutdown_timeout_s=0.0),
            ModelInfo(name="m", max_model_len=8, vocab_size=8),
            LogOptions(),
        )
        self.lives: list[tuple[int, asyncio.Future[int]]] = []
        self.failures: list[OSError] = []
        self.listens = True
        self.leaves_with = 0
        self.came = asyncio.Condition()

    async def _live(self, place: Any, listener_fd: int, directory: str) -> int:
        if self.failures:
            raise self.failures.pop()
        end: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.lives.append((place.index, end))
        listens = self.listens
        place.process = SimpleNamespace(
            send_signal=lambda number: end.set_result(self.leaves_with if listens else -number)
        )
        if listens:
            place.listening.set()
        async with self.came:
            self.came.notify_all()
        try:
            return await end
        finally:
            place.process = None

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
        processes.failures.append(OSError("no more processes"))  # which may be different soon
        processes.lives[1][1].set_result(-9)
        await processes.until(lambda: len(processes.lives) == 3)
        assert [index for index, _ in processes.lives] == [0, 1, 1]
        assert not processes.failures
        now.requested.set()
        assert await now.task == 0, "how a former life has ended is no failure of the server"


async def test_to_leave_while_one_is_not_there_is_no_failure():
    processes = FakeProcesses(failure=FailureConfig(backoff_s=500.0, max_backoff_s=600.0))
    async with running(processes) as now:
        await now.listening.wait()
        for count in (3, 4):
            processes.lives[-1][1].set_result(-9)  # after the second time there is a pause
            if count == 3:
                await processes.until(lambda: len(processes.lives) == 3)
        now.requested.set()
        assert await now.task == 0
    assert len(processes.lives) == 3


async def test_one_that_is_told_to_leave_before_it_listens_does_so():
    processes = FakeProcesses()
    processes.listens = False
    async with running(processes) as now:
        await processes.until(lambda: len(processes.lives) == 2)
        now.requested.set()
        assert await now.task == 0


async def test_one_that_leaves_otherwise_than_told_has_failed():
    processes = FakeProcesses()
    async with running(processes) as now:
        await now.listening.wait()
        processes.leaves_with = 3
        now.requested.set()
        assert await now.task == 1


async def test_one_that_dies_again_and_again_ends_the_server(capsys: pytest.CaptureFixture[str]):
    processes = FakeProcesses()
    async with running(processes) as now:
        for count in range(FAILURE.max_crashes):
            await processes.until(lambda count=count: len(processes.lives) == 2 + count)
            processes.lives[-1][1].set_result(-9)
        assert await now.task == 1
    assert len(processes.lives) == 1 + FAILURE.max_crashes
    assert "API process 1 was killed by SIGKILL" in capsys.readouterr().err


async def test_one_that_never_listens_ends_the_start():
    processes = FakeProcesses()
    processes.listens = False
    async with running(processes) as now:
        await processes.until(lambda: len(processes.lives) == 2)
        processes.lives[0][1].set_result(1)
        assert await now.task == 1
        assert not now.listening.is_set()
    assert len(processes.lives) == 2


async def test_where_nobody_replaces_workers_one_that_dies_ends_the_server():
    processes = FakeProcesses(supervised=False)
    async with running(processes) as now:
        await now.listening.wait()
        processes.lives[0][1].set_result(-9)
        assert await now.task == 1
    assert len(processes.lives) == 2


async def test_when_nothing_can_go_on_they_leave_by_themselves():
    processes = FakeProcesses()
    async with running(processes) as now:
        await now.listening.wait()
        processes.fronts.died.set()
        for _, end in processes.lives:
            end.set_result(1)
        assert await now.task == 1
    assert len(processes.lives) == 2

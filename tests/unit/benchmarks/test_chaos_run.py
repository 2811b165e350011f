"""In which order the chaos benchmark does its faults: each hits a worker that serves, however fast the tokens come."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.chaos import run
from benchmarks.chaos.faults import Fault
from benchmarks.chaos.run import hurt
from benchmarks.chaos.streams import Answer, make_load

LOAD = make_load(2, 0, 10, 101)
LOOKS_UNTIL_NOTICED = 3  # the server says of a worker that it serves until it has seen that it is dead


class FakeServer:
    """Two workers; one that is killed is missed some looks later, and back at the next look.

    Attributes:
        done: what has happened to whom: kind, title, life.
        has_told: pids.
    """

    def __init__(self) -> None:
        self.done: list[tuple[str, str, int]] = []
        self.has_told = False
        self._lives = {"expert 0": 0, "expert 1": 0}
        self._looks: dict[str, int] = {}  # since a worker was killed

    def lives(self) -> dict[str, tuple[str, int]]:
        for title in [*self._looks]:
            self._looks[title] += 1
            if self._looks[title] > LOOKS_UNTIL_NOTICED:
                del self._looks[title]
                self._lives[title] += 1
        return {title: ("serving", life) for title, life in self._lives.items()}

    def pids(self) -> dict[str, int]:
        self.has_told = True
        return {title: self._pid(title) for title in self._lives if title not in self._looks}

    def _pid(self, title: str) -> int:
        return 10 * (1 + [*self._lives].index(title)) + self._lives[title]

    def kill(self, pid: int, _: int) -> None:
        titles = {other: title for title, other in self.pids().items()}
        if pid not in titles:
            raise ProcessLookupError(pid)
        self.done.append(("kill", titles[pid], self._lives[titles[pid]]))
        self._looks[titles[pid]] = 0

    def cut(self, workers: Any) -> None:
        self.done += [("cut", title, self._lives[title]) for title in workers]

    def heal(self, workers: Any) -> None:
        pass

    def taken_for_dead(self, worker: str, pid: int) -> float | None:
        return 1.0

    def complaints(self) -> str:
        return "what the server said\n"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    server = FakeServer()
    monkeypatch.setattr(run, "_POLL_S", 0.0)
    monkeypatch.setattr(run.os, "kill", server.kill)
    return server


def fault(kind: Any, worker: str, at: float) -> Fault:
    return Fault(kind=kind, workers=(worker,), at=at, seconds=0.0)


async def test_who_was_killed_is_back_before_the_next_fault(server: Any) -> None:
    """All tokens have come before the first look is over: both faults are due at once."""
    faults = [fault("kill", "expert 0", 0.1), fault("cut", "expert 0", 0.7), fault("kill", "expert 1", 0.8)]
    progress, streams = SimpleNamespace(num_tokens=LOAD.num_tokens), asyncio.get_running_loop().create_future()
    incidents = await hurt(server, faults, LOAD, progress, streams)
    assert sorted(server.done) == [("cut", "expert 0", 1), ("kill", "expert 0", 0), ("kill", "expert 1", 0)]
    assert all(incident.healed is not None for incident in incidents)
    assert [incident.fault for incident in incidents] == faults


async def test_a_fault_that_comes_too_late_is_told(server: Any) -> None:
    streams: asyncio.Future[list[Answer]] = asyncio.get_running_loop().create_future()
    streams.set_result([])
    with pytest.raises(AssertionError, match="ended before kill -9 expert 1"):
        await hurt(server, [fault("kill", "expert 1", 0.5)], LOAD, SimpleNamespace(num_tokens=9), streams)
    assert server.done == []


async def test_a_worker_that_nobody_has_hurt_is_told_with_what_the_server_said(server: Any) -> None:
    streams, progress = asyncio.get_running_loop().create_future(), SimpleNamespace(num_tokens=0)
    hurting = asyncio.create_task(hurt(server, [fault("kill", "expert 1", 0.5)], LOAD, progress, streams))
    while not server.has_told:  # noqa: ASYNC110 - it tells nobody
        await asyncio.sleep(0)
    server.kill(server.pids()["expert 1"], 9)
    progress.num_tokens = LOAD.num_tokens
    with pytest.raises(AssertionError, match="which nobody had hurt:\nwhat the server said"):
        await hurting

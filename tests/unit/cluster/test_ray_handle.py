"""One life of a worker on Ray, as the server sees it, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from ray.exceptions import RayError

from amoe.cluster.ray_cluster import handle
from amoe.cluster.ray_cluster.actor import Whereabouts
from amoe.cluster.ray_cluster.handle import RayWorker
from amoe.engine.messages import Failed, Ready, ToServer
from amoe.errors import ConfigError, EngineDeadError

WHERE = Whereabouts("10.0.0.3", "node", 5, "1", {})


class FakeThread:
    """Ray's thread, which never gets to do anything."""

    def __init__(self) -> None:
        self.posted: list[Callable[[], object]] = []

    def post(self, function: Callable[[], object]) -> None:
        self.posted.append(function)


class FakeChannel:
    """Says `messages`, then ends."""

    def __init__(self, *messages: ToServer) -> None:
        self.messages = list(messages)
        self.is_closed = False

    def __aiter__(self) -> FakeChannel:
        return self

    async def __anext__(self) -> ToServer:
        if not self.messages:
            raise StopAsyncIteration
        return self.messages.pop(0)

    def abort(self) -> None:
        self.is_closed = True

    async def close(self) -> None:
        self.is_closed = True


class Life:
    """A worker, and what became of it."""

    def __init__(self, *messages: ToServer) -> None:
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.channel: Any = FakeChannel(*messages)
        self.exits: list[str] = []
        self.places_given_back = 0
        self.times_given_up = 0
        thread: Any = FakeThread()
        self.thread = thread
        self.worker = RayWorker(
            1,
            0,
            "expert 0",
            object(),
            WHERE,
            self.ended,
            self.channel,
            thread,
            self._on_exit,
            self._on_kill,
            self._give_back,
        )

    def _on_exit(self, worker: Any) -> None:
        self.exits.append(worker.describe_exit())

    def _on_kill(self) -> None:
        self.times_given_up += 1

    def _give_back(self) -> None:
        self.places_given_back += 1


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handle, "FENCE_S", 0.01)
    monkeypatch.setattr(handle, "_EXIT_GRACE_S", 0.01)


async def test_an_actor_that_dies_is_noticed() -> None:
    life = Life()
    life.ended.set_exception(RayError("its worker process has died"))
    await life.worker.exited.wait()
    assert life.exits == ["expert 0 (pid 5 on 10.0.0.3) died: it was killed, or crashed"]
    await life.worker.close()
    assert life.channel.is_closed and life.places_given_back == 1


async def test_one_whose_host_is_cut_off_is_taken_for_dead_and_heard_no_more() -> None:
    life = Life()
    life.worker.kill()
    life.worker.kill()
    assert life.times_given_up == 1, "nobody has to reach it any more"
    await life.worker.exited.wait()
    assert life.channel.is_closed and len(life.exits) == 1 and "has not confirmed" in life.exits[0]
    assert len(life.thread.posted) == 2, "Ray is asked to end it, and a task on its node to kill it"
    life.ended.set_exception(RayError("killed by ray.kill"))  # it comes back
    await asyncio.sleep(0)
    assert len(life.exits) == 1
    await life.worker.close()


async def test_a_worker_that_left_says_with_what_status() -> None:
    life = Life()
    life.ended.set_result(0)
    await life.worker.exited.wait()
    assert life.exits == ["expert 0 (pid 5 on 10.0.0.3) exited with status 0"]
    await life.worker.close()


async def test_what_is_wrong_on_a_node_is_told_with_the_node() -> None:
    life = Life(Failed("/models/m has no config.json", user_error=True))
    with pytest.raises(ConfigError, match=r"^expert 0 \(pid 5 on 10\.0\.0\.3\): /models/m has no config\.json$"):
        await life.worker.wait_ready(lambda worker, message: None)
    await life.worker.close()


async def test_one_that_goes_without_a_word_is_told_with_where_its_output_is() -> None:
    life = Life()
    with pytest.raises(
        EngineDeadError, match=r"while starting\n  \| its output: `ray logs worker --node-ip 10\.0\.0\.3"
    ):
        await life.worker.wait_ready(lambda worker, message: None)
    await life.worker.close()


async def test_ready() -> None:
    ready = Ready(128, 4, 16, 1000)
    life = Life(ready)
    assert await life.worker.wait_ready(lambda worker, message: None) == ready
    await life.worker.close()

"""Several engines in front of the same workers, and who supervises them for all: over their real links, in one process.

The workers are their control ports and nothing else: what they hear is looked at, what they say is said by a test.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from amoe.cluster.admin import AdminView, ClusterStatus, Order, Scale
from amoe.cluster.front_ends import FrontEnd, FrontEnds
from amoe.cluster.front_link import FrontLink
from amoe.cluster.front_messages import Attach, Health, Listening, Lose
from amoe.cluster.parent_link import ParentLink
from amoe.config import EngineConfig, FailureConfig, PlacementConfig
from amoe.engine.async_engine import AsyncEngine, ModelInfo
from amoe.engine.control import AsyncControlChannel, SocketControlPort
from amoe.engine.load import Front
from amoe.engine.messages import AddRequest, Heartbeat, Outputs, ToServer, ToWorker
from amoe.engine.shared_control import SharedControlPort, door_pair, put_through
from amoe.engine.tokenizer import Tokenizer
from amoe.errors import ConfigError, EngineDeadError, TransportError
from amoe.stats import WorkerStats
from amoe.types import SamplingParams, SequenceOutput
from tests.fake_workers import make_tokenizer

PROMPT, PARAMS = [5, 6, 7], SamplingParams(max_tokens=8, temperature=0.0)


class Worker:
    """One life of a worker. `heard` is all that has come, `hear` waits for it."""

    def __init__(self, rank: int, incarnation: int = 0) -> None:
        self.rank, self.incarnation = rank, incarnation
        self.door, door = door_pair()
        self.control, theirs = socket.socketpair()
        self.port = SharedControlPort(SocketControlPort(theirs), door)
        self.channel = cast(AsyncControlChannel, None)
        self.heard: list[ToWorker] = []

    async def connect(self) -> Worker:
        self.channel = await AsyncControlChannel.open(self.control)
        return self

    async def hear(self, count: int) -> list[AddRequest]:
        """The requests that have come, once there are so many."""

        def look() -> bool:
            self.heard += self.port.receive()
            return len(self.requests) >= count

        await until(look)
        return self.requests

    @property
    def requests(self) -> list[AddRequest]:
        return [message for message in self.heard if isinstance(message, AddRequest)]

    def beat(self, loops: int) -> None:
        self.port.receive()  # whoever stands before the door
        self.port.send(Heartbeat(WorkerStats(self.rank, "colocated", loops=loops)))

    async def close(self) -> None:
        self.port.close()
        self.door.close()
        await self.channel.close()


class Process:
    """What an API process has: an engine that follows its parent."""

    def __init__(self, number: int, sock: socket.socket, config: EngineConfig, tokenizer: Tokenizer) -> None:
        model = ModelInfo(name="fake", max_model_len=64, vocab_size=300)
        self.engine = AsyncEngine(
            [], config, tokenizer, model, front=Front(index=number, count=2), supervised=config.survives_losses
        )
        self.engine.run()
        self.link = FrontLink.of_front(sock)
        self.parent = ParentLink(self.link, self.engine)
        self.following = asyncio.create_task(self.parent.run())

    def value(self, name: str, **labels: str) -> float:
        return self.engine.metrics.registry.get_sample_value(f"amoe:{name}", labels) or 0.0

    async def close(self) -> None:
        self.following.cancel()
        await asyncio.gather(self.following, return_exceptions=True)
        self.link.close()
        await self.engine.close()


class Desk:
    """Takes orders, and refuses what it cannot do."""

    def __init__(self) -> None:
        self.orders: list[Order] = []

    async def look(self) -> AdminView:
        return AdminView(status=ClusterStatus(version=7), actions=[])

    async def order(self, order: Order, *, wait: bool) -> int:
        self.orders.append(order)
        if isinstance(order, Scale) and order.count > 4:
            raise ConfigError("no room")
        if isinstance(order, Scale) and order.count > 2:
            raise ZeroDivisionError("secret")
        return len(self.orders)


class Setup:
    """Two attention workers, and as many API processes as a test calls in."""

    def __init__(self, directory: Path) -> None:
        self.config = EngineConfig(
            model="m", placement=PlacementConfig(colocated=2), failure=FailureConfig(timeout_s=600.0)
        )
        self.tokenizer = Tokenizer(str(make_tokenizer(directory / "tokenizer")))
        self.desk = Desk()
        self.listened: list[asyncio.Event] = []
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Setup:
        self.workers = {rank: await self.worker(rank) for rank in (0, 1)}
        cluster: Any = SimpleNamespace(
            config=self.config,
            owners=None,
            workers=self.workers,
            channels=[worker.channel for worker in self.workers.values()],
            let_in=lambda front, rank: put_through(self.workers[rank].door, front),
        )
        self.fronts = FrontEnds(cluster)
        self.fronts.run()
        self._stack.push_async_callback(self.fronts.close)
        self.gone: list[tuple[int, str]] = []
        self.fronts.on_gone = lambda rank, reason: self.gone.append((rank, reason))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def worker(self, rank: int, incarnation: int = 0) -> Worker:
        worker = await Worker(rank, incarnation).connect()
        self._stack.push_async_callback(worker.close)
        return worker

    async def call_in(self, number: int) -> Process:
        """One more API process, that may serve."""
        ours, theirs = socket.socketpair()
        listening = asyncio.Event()
        self.listened.append(listening)
        front = FrontEnd(number, FrontLink.of_parent(ours), listening)
        hearing = asyncio.create_task(front.listen(self.desk, self.fronts.on_front_gone))
        process = Process(number, theirs, self.config, self.tokenizer)
        self._stack.push_async_callback(asyncio.wait_for, hearing, 30)
        self._stack.callback(front.hang_up)
        self._stack.callback(self.fronts.remove, front)
        self._stack.push_async_callback(process.close)
        self.fronts.add(front)
        await process.parent.may_serve.wait()
        return process


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110 - what it waits for happens in sockets
            await asyncio.sleep(0.001)


@pytest.fixture
async def setup(tmp_path: Path) -> AsyncIterator[Setup]:
    async with Setup(tmp_path) as setup:
        yield setup


def token(request: AddRequest, token_id: int) -> ToServer:
    return Outputs([], [request.request_id], [token_id])


async def test_each_lets_its_own_sequences_go_on_elsewhere(setup: Setup) -> None:
    processes = [await setup.call_in(number) for number in (0, 1)]
    generations = [process.engine.start([(PROMPT, PARAMS)])[0] for process in processes]
    assert [generation.rank for generation in generations] == [0, 0]
    dying, other = setup.workers[0], setup.workers[1]
    requests = await dying.hear(2)
    for token_id, request in enumerate(requests, 20):
        dying.port.send(token(request, token_id))  # its last words
    dying.port.close()
    await setup.fronts.lose(0, "worker 0 was killed")
    resumed = await other.hear(2)
    assert {(r.request_id, tuple(r.prompt_token_ids), r.num_generated) for r in resumed} == {
        (request.request_id, (*PROMPT, token_id), 1) for token_id, request in enumerate(requests, 20)
    }
    for request in resumed:
        other.port.send(Outputs([SequenceOutput(request.request_id, [30], finish_reason="stop")]))
    for generation in generations:
        tokens = [token_id async for delta in generation for token_id in delta.token_ids]
        assert tokens[0] in (20, 21) and generation.finish_reason == "stop" and generation.num_moves == 1


async def test_the_next_life_is_listened_to_after_the_last(setup: Setup) -> None:
    processes = [await setup.call_in(number) for number in (0, 1)]
    first = setup.workers[0]
    first.beat(loops=9)
    await until(lambda: all(0 in process.engine.metrics.workers for process in processes))
    first.port.close()
    # Nothing is awaited in between: all of it lies in the links when the processes begin to read.
    losing = asyncio.create_task(setup.fronts.lose(0, "worker 0 was killed"))
    setup.fronts.metrics.worker_lost(0, "colocated", "exit")
    await losing
    setup.workers[0] = second = await setup.worker(0, incarnation=1)
    setup.fronts.attach(0, second.channel)
    setup.fronts.metrics.worker_back(0, "colocated", 1.5)
    second.beat(loops=2)
    await until(lambda: all(process.engine.metrics.workers[0].loops == 9 + 2 for process in processes))
    await until(
        lambda: any(process.value("worker_respawns_total", worker="0", role="colocated") for process in processes)
    )
    losses = [process.value("worker_losses_total", worker="0", role="colocated", kind="exit") for process in processes]
    assert sum(losses) == 1, "one of them counts it for all"

    late = await setup.call_in(2)
    second.beat(loops=3)
    await until(lambda: 0 in late.engine.metrics.workers)
    assert late.engine.metrics.workers[0].loops == 9 + 3, "of a life that it has never seen"


async def test_a_channel_that_ends_is_told_once_for_each_life(setup: Setup) -> None:
    process = await setup.call_in(0)
    setup.workers[1].port.close()
    await until(lambda: len(setup.gone) == 2)  # by this process, and by the other one
    assert {rank for rank, _ in setup.gone} == {1}
    setup.gone.clear()
    await setup.fronts.lose(1, "worker 1 has gone")
    setup.workers[1] = second = await setup.worker(1, incarnation=1)
    setup.fronts.attach(1, second.channel)
    process.parent._lives[1] = 0  # as if it had been slow to say so of the life before
    process.engine.on_gone(1, "late news")  # type: ignore[misc]
    assert (await process.parent.desk.look()).status.version == 7, "all before it has been heard"
    assert setup.gone == []


async def test_whoever_is_lost_already_is_not_lost_again(setup: Setup) -> None:
    """As when a worker dies while it is draining; and for a process that has never seen it alive."""
    processes = [await setup.call_in(0)]
    setup.workers[0].port.close()
    await setup.fronts.lose(0, "worker 0 has died while it was draining")
    processes.append(await setup.call_in(1))
    await setup.fronts.lose(0, "worker 0 has left")
    for process in processes:
        assert (await process.parent.desk.look()).status.version == 7, "all before it has been heard"
        assert not process.engine.died.is_set() and not process.following.done()


async def test_a_worker_that_left_and_came_again_is_heard_whenever_it_began(setup: Setup) -> None:
    process = await setup.call_in(0)
    first = setup.workers[1]
    first.beat(loops=9)  # of a short life
    await until(lambda: 1 in process.engine.metrics.workers)
    first.port.close()
    await setup.fronts.lose(1, "worker 1 has left")
    setup.fronts.metrics.worker_removed(1)
    setup.workers[1] = second = await setup.worker(1, incarnation=1)
    setup.fronts.attach(1, second.channel)
    second.beat(loops=40)
    await until(lambda: 1 in process.engine.metrics.workers and process.engine.metrics.workers[1].loops == 9 + 40)


async def test_what_all_are_told(setup: Setup) -> None:
    setup.fronts.trouble = "expert 0 has died 5 times"
    first = await setup.call_in(0)
    assert first.engine.complaint == "expert 0 has died 5 times"
    setup.fronts.trouble, setup.fronts.note = "", "expert 0 has died and is being replaced"
    second = await setup.call_in(1)
    await until(lambda: first.engine.note == second.engine.note == "expert 0 has died and is being replaced")
    assert first.engine.healthy and second.engine.healthy
    second.parent.say_listening()
    await until(setup.listened[1].is_set)
    assert not setup.listened[0].is_set()
    setup.fronts.metrics.experts_moved(3)
    setup.fronts.die("nothing works")
    setup.fronts.die("nor does this")
    await until(lambda: first.engine.died.is_set() and second.engine.died.is_set())
    assert first.engine.complaint == second.engine.complaint == "nothing works"
    moved = [process.value("experts_moved_total", model_name="fake") for process in (first, second)]
    assert sorted(moved) == [0, 3]


async def test_an_operator_asks_any_of_them(setup: Setup) -> None:
    desks = [(await setup.call_in(number)).parent.desk for number in (0, 1)]
    assert [(await desk.look()).status.version for desk in desks] == [7, 7]
    assert [await desk.order(Scale(2), wait=True) for desk in desks] == [1, 2]
    with pytest.raises(ConfigError, match="no room"):
        await desks[0].order(Scale(5), wait=True)
    with pytest.raises(RuntimeError) as failure:
        await desks[1].order(Scale(3), wait=False)
    assert "secret" not in str(failure.value)
    assert setup.desk.orders == [Scale(2), Scale(2), Scale(5), Scale(3)]


async def test_without_its_parent_it_is_of_no_use(setup: Setup) -> None:
    process = await setup.call_in(0)
    for front in setup.fronts._fronts.values():
        front.hang_up()
    asking = asyncio.create_task(process.parent.desk.look())
    await process.engine.died.wait()
    for look in (asking, process.parent.desk.look()):
        with pytest.raises(EngineDeadError, match="cannot be heard any more"):
            await look


async def test_one_that_does_not_answer_is_found_out(monkeypatch: pytest.MonkeyPatch, setup: Setup) -> None:
    monkeypatch.setattr("amoe.cluster.front_ends.PING_S", 0.01)
    process = await setup.call_in(0)
    (front,) = setup.fronts._fronts.values()
    watching = asyncio.create_task(front.fall_silent())
    await until(lambda: front._has_answered)
    monkeypatch.setattr("amoe.cluster.front_ends.SILENCE_S", 0.05)
    process.following.cancel()  # as if it stood still
    await asyncio.wait_for(watching, 30)


async def test_a_link_that_nobody_reads_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amoe.cluster.front_link.MAX_UNSENT", 5)
    ours, theirs = socket.socketpair()
    parent, front = FrontLink.of_parent(ours), FrontLink.of_front(theirs)
    kept, passed = socket.socketpair()
    for number in range(9):
        parent.send(Lose(number, "x" * 300_000))
    parent.send(Attach(9, 0), passed)
    assert kept.recv(9) == b"", "what cannot be sent is closed"
    with pytest.raises(StopAsyncIteration):
        await anext(parent)
    heard = [message async for message in front]
    assert heard == [Lose(number, "x" * 300_000) for number in range(len(heard))] and len(heard) < 9
    kept.close()
    parent.close()
    front.close()


async def test_messages_and_sockets_come_in_order_however_much_there_is() -> None:
    ours, theirs = socket.socketpair()
    parent, front = FrontLink.of_parent(ours), FrontLink.of_front(theirs)
    ends = [socket.socketpair() for _ in range(3)]
    for number, (_, passed) in enumerate(ends):
        parent.send(Lose(number, "x" * 300_000))  # more than a socket takes
        parent.send(Attach(number, 0), passed)
    parent.send(Health("", ""))
    for number, (kept, passed) in enumerate(ends):
        assert await anext(front) == Lose(number, "x" * 300_000)
        assert await anext(front) == Attach(number, 0)
        with front.take_socket() as taken:
            taken.send(b"%d" % number)
        assert kept.recv(9) == b"%d" % number
        assert passed.fileno() == -1, "whoever sends it has no use for it any more"
        kept.close()
    assert await anext(front) == Health("", "")
    with pytest.raises(TransportError, match="did not arrive"):
        front.take_socket()
    front.send(Listening())
    front.close()
    assert await anext(parent) == Listening()
    with pytest.raises(StopAsyncIteration):
        await anext(parent)
    kept, passed = socket.socketpair()
    parent.send(Attach(9, 0), passed)  # nobody is there
    assert kept.recv(9) == b""
    kept.close()
    parent.close()
    parent.close()

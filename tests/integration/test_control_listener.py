"""Control channels over TCP: workers come in by their secret, and nobody else does."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator

import msgspec
import pytest

from amoe.cluster.control_listener import MAX_STRANGERS, ControlListener, Hello, connect_control
from amoe.cluster.process import TcpControl
from amoe.engine.control import SocketControlPort
from amoe.engine.messages import AbortRequests, Applied, Stop, ToWorker
from amoe.errors import EngineDeadError


@pytest.fixture
async def listener() -> AsyncIterator[ControlListener]:
    listener = await ControlListener.open("127.0.0.1")
    yield listener
    await listener.close()


async def connected(control: TcpControl, rank: int, incarnation: int) -> SocketControlPort:
    return SocketControlPort(await asyncio.to_thread(connect_control, control, rank, incarnation))


async def received(port: SocketControlPort) -> list[ToWorker]:
    for _ in range(3000):
        if messages := port.receive():
            return messages
        await asyncio.sleep(0.01)
    raise AssertionError("nothing came")


async def test_both_sides_are_heard_until_one_goes(listener: ControlListener) -> None:
    control = listener.expect(3, 1)
    port = await connected(control, 3, 1)
    channel = await listener.channel(3, 1)
    port.send(Applied(7))
    assert await anext(channel) == Applied(7)
    channel.send(AbortRequests([5]))
    assert await received(port) == [AbortRequests([5])]
    await channel.close()
    assert await received(port) == [Stop()]
    port.close()


async def test_waiting_may_begin_first_and_workers_come_in_any_order(listener: ControlListener) -> None:
    controls = [listener.expect(rank, 0) for rank in range(3)]
    waiting = [asyncio.create_task(listener.channel(rank, 0)) for rank in range(3)]
    ports = {rank: await connected(controls[rank], rank, 0) for rank in (2, 0, 1)}
    for rank, channel in enumerate(await asyncio.gather(*waiting)):
        ports[rank].send(Applied(rank))
        assert await anext(channel) == Applied(rank)
        await channel.close()
        ports[rank].close()


def hello(token: str, rank: int, incarnation: int) -> bytes:
    body = msgspec.msgpack.encode(Hello(token, rank, incarnation))
    return struct.pack("<I", len(body)) + body


async def is_refused(listener: ControlListener, sent: bytes) -> bool:
    """The connection is closed, and nothing was said."""
    reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
    try:
        writer.write(sent)
        return await asyncio.wait_for(reader.read(), 60) == b""
    except ConnectionError:
        return True
    finally:
        writer.close()


async def test_strangers_are_refused_and_the_worker_still_comes_in(listener: ControlListener) -> None:
    old = listener.expect(1, 4)
    control = listener.expect(1, 5)
    for sent in (
        hello("", 1, 5),
        hello("x" * len(control.token), 1, 5),
        hello(control.token, 1, 4),  # a life that is over
        hello(old.token, 1, 4),
        hello(old.token, 1, 5),
        hello(control.token, 2, 5),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        struct.pack("<I", 5) + b"\xc1\xc1\xc1\xc1\xc1",
        struct.pack("<I", 1 << 30),
    ):
        assert await is_refused(listener, sent), sent
    port = await connected(control, 1, 5)
    channel = await listener.channel(1, 5)
    assert await is_refused(listener, hello(control.token, 1, 5))  # the secret opens one channel
    await channel.close()
    port.close()


async def test_a_crowd_that_says_nothing_keeps_no_worker_out(listener: ControlListener) -> None:
    crowd = [await asyncio.open_connection("127.0.0.1", listener.port) for _ in range(MAX_STRANGERS + 5)]
    control = listener.expect(0, 0)
    port = await connected(control, 0, 0)
    channel = await asyncio.wait_for(listener.channel(0, 0), 60)
    assert await asyncio.wait_for(crowd[0][0].read(), 60) == b"", "who came first has made room"
    port.send(Applied(7))
    assert await anext(channel) == Applied(7)
    await channel.close()
    port.close()
    for _, writer in crowd:
        writer.close()


async def test_who_says_nothing_holds_a_place_for_a_short_while_only(
    listener: ControlListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amoe.cluster.control_listener.HELLO_TIMEOUT_S", 0.2)
    mute = [await asyncio.open_connection("127.0.0.1", listener.port) for _ in range(3)]
    for reader, writer in mute:
        assert await asyncio.wait_for(reader.read(), 60) == b""
        writer.close()
    control = listener.expect(0, 0)
    port = await connected(control, 0, 0)
    await (await listener.channel(0, 0)).close()
    port.close()


async def test_who_is_forgotten_is_waited_for_no_more(listener: ControlListener) -> None:
    control = listener.expect(0, 0)
    waiting = asyncio.create_task(listener.channel(0, 0))
    await asyncio.sleep(0)
    listener.expect(0, 1)  # its next life is awaited instead
    with pytest.raises(EngineDeadError, match="not expected any more"):
        await waiting
    listener.forget(0, 1)
    with pytest.raises(EngineDeadError, match="not expected"):
        await listener.channel(0, 1)
    assert await is_refused(listener, hello(control.token, 0, 0))


async def test_a_server_that_cannot_be_reached_is_told() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, and nobody listens
        port = unused.getsockname()[1]
        with pytest.raises(EngineDeadError, match=f"cannot reach the server at 127.0.0.1:{port}"):
            await asyncio.to_thread(connect_control, TcpControl("127.0.0.1", port, "t"), 0, 0)

"""The protocol of a connection, over a transport that only remembers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from amoe.server.http_protocol import MAX_HEAD_BYTES, LimitedHttpProtocol

GET = b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n"


class Transport:
    """What the protocol wants of one."""

    def __init__(self) -> None:
        self.sent = b""
        self.closed = False
        self.num_waiting = 0

    def get_extra_info(self, name: str) -> Any:
        return None

    def write(self, data: bytes) -> None:
        self.sent += data

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def get_write_buffer_size(self) -> int:
        return self.num_waiting

    def can_write_eof(self) -> bool:
        return False

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class Connection:
    """One connection to an application whose streams go on until their client has gone.

    Attributes:
        begun, left: paths of the requests that have begun, and of those whose client has gone.
    """

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.left: list[str] = []
        self.bodies: list[bytes] = []
        self.transport = Transport()
        self.state = ServerState()
        config = uvicorn.Config(
            self._app, lifespan="off", log_config=None, ws="none", access_log=False, interface="asgi3"
        )
        self.protocol = LimitedHttpProtocol(config, self.state, {})
        self.protocol.connection_made(self.transport)  # type: ignore[arg-type]

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        self.begun.append(scope["path"])
        body, message = b"", await receive()
        while message["type"] == "http.request" and message["more_body"]:
            body += message["body"]
            message = await receive()
        if message["type"] == "http.request":
            self.bodies.append(body + message["body"])
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"data", "more_body": True})
            assert (await receive())["type"] == "http.disconnect"
        self.left.append(scope["path"])

    async def feed(self, *pieces: bytes) -> None:
        """These pieces come in, one after the other, and what they start gets its turn."""
        for piece in pieces:
            self.protocol.data_received(piece)
            for _ in range(5):
                await asyncio.sleep(0)

    async def lose(self) -> None:
        """The client goes."""
        self.transport.closed = True
        self.protocol.connection_lost(None)
        for _ in range(5):
            await asyncio.sleep(0)


@pytest.fixture
async def connection() -> AsyncIterator[Connection]:
    connection = Connection()
    yield connection
    await connection.lose()
    for task in connection.state.tasks:
        task.cancel()


async def test_a_client_that_goes_is_noticed_though_it_has_sent_another_request(connection: Connection):
    await connection.feed(GET % b"a")
    await connection.feed(GET % b"b")
    assert connection.begun == ["/a"]
    await connection.lose()
    assert connection.left == ["/a"]
    assert not connection.state.tasks


async def test_nothing_is_written_into_an_answer_that_has_begun(connection: Connection):
    await connection.feed(GET % b"a")
    sent = connection.transport.sent
    await connection.feed(GET % b"b" + b"nonsense\r\n\r\n")
    assert connection.transport.sent == sent
    assert connection.transport.closed
    assert connection.left == ["/a"]


async def test_nonsense_before_an_answer_is_answered(connection: Connection):
    await connection.feed(b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", b"nonsense\r\n")
    assert connection.transport.sent.startswith(b"HTTP/1.1 400 ")
    assert connection.left == ["/a"]


CHUNKED = b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"


async def test_trailers_are_read_and_forgotten(connection: Connection):
    await connection.feed(CHUNKED, b"0\r\n", *[b"x: y\r\n" * 1000] * 40)
    assert len(connection.protocol.headers) == 2
    assert not connection.transport.closed and connection.bodies == []
    await connection.feed(b"\r\n")
    assert connection.bodies == [b"abc"]


async def test_a_trailer_without_end_is_refused(connection: Connection):
    await connection.feed(CHUNKED, b"0\r\nx: ", *[b"y" * 10_000] * (MAX_HEAD_BYTES // 10_000 + 2))
    assert connection.transport.sent.startswith(b"HTTP/1.1 431 ")
    assert connection.left == ["/a"]


async def test_a_large_body_is_no_head(connection: Connection):
    num_pieces = 4 * MAX_HEAD_BYTES // 1024
    head = b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (num_pieces * 1024)
    await connection.feed(head, *[b"y" * 1024] * num_pieces)
    assert connection.transport.sent.startswith(b"HTTP/1.1 200 ")
    assert connection.bodies == [b"y" * (num_pieces * 1024)]


async def test_a_client_that_reads_nothing_is_cut_off(connection: Connection, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("amoe.server.http_protocol.READ_TIMEOUT_S", 0.0)
    await connection.feed(GET % b"a")
    connection.transport.num_waiting = 100_000
    connection.protocol.pause_writing()
    for num_waiting in (90_000, 80_000, 79_999):  # a slow one is not
        connection.transport.num_waiting = num_waiting
        await asyncio.sleep(0)
        assert not connection.transport.closed
    for _ in range(5):
        await asyncio.sleep(0)
    assert connection.transport.closed


async def test_a_client_that_reads_again_is_left_alone(connection: Connection, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("amoe.server.http_protocol.READ_TIMEOUT_S", 0.0)
    await connection.feed(GET % b"a")
    connection.transport.num_waiting = 100_000
    connection.protocol.pause_writing()
    connection.transport.num_waiting = 0
    connection.protocol.resume_writing()
    for _ in range(5):
        await asyncio.sleep(0)
    assert not connection.transport.closed

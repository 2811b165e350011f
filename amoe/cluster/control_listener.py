"""Control channels over TCP, for workers on other hosts: they connect, and say who they are.

Each launch has a secret of its own, which opens one channel, once, for one life of one worker. Whoever says anything
else is cut off, is told nothing, and can hold neither much memory nor a place for long.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import socket
import struct
from typing import NamedTuple

import msgspec

from amoe.cluster.process import TcpControl
from amoe.engine.control import AsyncControlChannel
from amoe.errors import EngineDeadError

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 15.0
HELLO_TIMEOUT_S = 5.0
MAX_HELLO_BYTES = 1024
MAX_STRANGERS = 64  # connections that have not said yet who they are: a worker says so at once
_LENGTH = struct.Struct("<I")
_STREAM_LIMIT = 1 << 20
# A host that is cut off is noticed after some ten seconds by whoever waits, and by whoever has something to say.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 4), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 3))
_USER_TIMEOUT_MS = 10_000


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="amoe-control-1"):
    """The first frame of a worker."""

    token: str
    rank: int
    incarnation: int


class _Seat(NamedTuple):
    """A channel that is expected."""

    token: str
    channel: asyncio.Future[AsyncControlChannel]


def tune(sock: socket.socket) -> None:
    """Small messages go out at once; a peer whose host is cut off is noticed."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)


def connect_control(control: TcpControl, rank: int, incarnation: int) -> socket.socket:
    """A worker's side: a connected socket, on which the worker has said who it is. Blocks.

    Raises:
        EngineDeadError: the server cannot be reached.
    """
    try:
        sock = socket.create_connection((control.host, control.port), CONNECT_TIMEOUT_S)
        tune(sock)
        body = msgspec.msgpack.encode(Hello(control.token, rank, incarnation))
        sock.sendall(_LENGTH.pack(len(body)) + body)
    except OSError as error:
        raise EngineDeadError(
            f"worker {rank} cannot reach the server at {control.host}:{control.port} ({error}): open that port between "
            "the hosts"
        ) from error
    return sock


class ControlListener:
    """The server's side. Make it with `open`, in the event loop that will use the channels; end it with `close`.

    Attributes:
        host, port: where workers find it.
    """

    def __init__(self, host: str) -> None:
        self.host = host
        self.port = 0
        self._server: asyncio.Server | None = None
        self._seats: dict[tuple[int, int], _Seat] = {}
        self._strangers: dict[asyncio.StreamWriter, None] = {}  # the oldest first
        self._num_refused = 0

    @classmethod
    async def open(cls, host: str, port: int = 0, *, bind: str | None = None) -> ControlListener:
        """Listen.

        Args:
            host: the name or address of this host as workers know it.
            port: 0 takes any.
            bind: the address to listen at; None: `host`.

        Raises:
            OSError: it cannot listen there.
        """
        listener = cls(host)
        server = await asyncio.start_server(listener._greet, bind or host, port, limit=_STREAM_LIMIT)
        listener._server = server
        listener.port = server.sockets[0].getsockname()[1]
        return listener

    def expect(self, rank: int, incarnation: int) -> TcpControl:
        """Let one life of a worker in; returns what that worker is told. Former lives of it come in no more."""
        for seat in [seat for seat in self._seats if seat[0] == rank]:
            self.forget(*seat)
        token = secrets.token_urlsafe(32)
        future: asyncio.Future[AsyncControlChannel] = asyncio.get_running_loop().create_future()
        self._seats[rank, incarnation] = _Seat(token, future)
        return TcpControl(self.host, self.port, token)

    async def channel(self, rank: int, incarnation: int) -> AsyncControlChannel:
        """The channel of a worker that is expected, once it has connected. Cancelling forgets the worker.

        Raises:
            EngineDeadError: it is expected no more.
        """
        seat = self._seats.get((rank, incarnation))
        if seat is None:
            raise EngineDeadError(f"worker {rank} is not expected")
        try:
            return await seat.channel
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or not task.cancelling():
                raise EngineDeadError(f"worker {rank} is not expected any more") from None
            raise
        finally:
            self._seats.pop((rank, incarnation), None)

    def forget(self, rank: int, incarnation: int) -> None:
        """Whoever waits for that worker, waits no more; the worker is not let in."""
        if (seat := self._seats.pop((rank, incarnation), None)) is not None:
            seat.channel.cancel()

    async def close(self) -> None:
        """Listen no more. The channels that are open are their owners'. Idempotent."""
        for seat in list(self._seats):
            self.forget(*seat)
        if self._server is not None:
            self._server.close()
            for writer in list(self._strangers):
                writer.close()
            await asyncio.sleep(0)  # the event loop closes the sockets in its next turn

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Find out who has connected; it is cut off unless it is expected."""
        peer = writer.get_extra_info("peername")
        if len(self._strangers) >= MAX_STRANGERS:  # the newcomer may be a worker; who has said nothing so far is none
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.close()
        self._strangers[writer] = None
        is_known = False
        try:
            hello = await asyncio.wait_for(_read_hello(reader), HELLO_TIMEOUT_S)
            is_known = self._admit(hello, reader, writer)
            if not is_known:
                self._refuse(peer, "it is a worker's that is not expected, or its token is wrong")
        except (OSError, EOFError, TimeoutError, ValueError, msgspec.MsgspecError):
            self._refuse(peer, "it is no worker's")
        finally:
            self._strangers.pop(writer, None)
            if not is_known:
                writer.close()

    def _refuse(self, peer: object, reason: str) -> None:
        self._num_refused += 1
        if self._num_refused & (self._num_refused - 1) == 0:  # 1, 2, 4, 8, ...: who floods the port floods no log
            logger.warning("refused connection number %d, from %s: %s", self._num_refused, peer, reason)

    def _admit(self, hello: Hello, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        seat = self._seats.get((hello.rank, hello.incarnation))
        expected = "" if seat is None else seat.token
        if not hmac.compare_digest(expected.encode(), hello.token.encode()) or seat is None or seat.channel.done():
            return False
        tune(writer.get_extra_info("socket"))
        seat.channel.set_result(AsyncControlChannel(reader, writer))
        return True


async def _read_hello(reader: asyncio.StreamReader) -> Hello:
    """What a stranger says first.

    Raises:
        ValueError, MsgspecError: it is none.
        EOFError, OSError: it has gone.
    """
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > MAX_HELLO_BYTES:
        raise ValueError("too long")
    return msgspec.msgpack.decode(await reader.readexactly(length), type=Hello)

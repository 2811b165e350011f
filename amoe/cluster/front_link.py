"""The socket between the parent and one API process: messages in order, and with some of them a socket to a worker."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import deque
from typing import Any, Generic, TypeVar

import msgspec

from amoe.cluster.front_messages import ToFront, ToParent
from amoe.engine.control import FrameReader, encode_frame
from amoe.errors import TransportError

logger = logging.getLogger(__name__)

MAX_UNSENT = 10_000  # messages: an hour of the worst of times, of which an API process that is stopped hears nothing
_CHUNK = 1 << 16
_MAX_SOCKETS = 64  # that come with one read

Incoming = TypeVar("Incoming")


class FrontLink(Generic[Incoming]):
    """One end: iterate over what the other one says, until it has gone. Use it in one event loop; end it with `close`.

    Whoever misses a message would go on in a wrong belief. So a link that cannot carry one ends, for both.

    Args:
        sock: a connected Unix stream socket, owned from now on.
        incoming: type of the messages that come.
    """

    def __init__(self, sock: socket.socket, incoming: Any) -> None:
        self._socket = sock
        self._socket.setblocking(False)
        self._frames = FrameReader()
        self._decoder: msgspec.msgpack.Decoder[Incoming] = msgspec.msgpack.Decoder(incoming)
        self._messages: deque[Incoming] = deque()
        self._sockets: deque[socket.socket] = deque()
        self._unsent: deque[tuple[bytes | bytearray, socket.socket | None]] = deque()
        self._has_ended = False
        self._has_come = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self._read)

    @classmethod
    def of_parent(cls, sock: socket.socket) -> FrontLink[ToParent]:
        """The parent's end."""
        return FrontLink[ToParent](sock, ToParent)

    @classmethod
    def of_front(cls, sock: socket.socket) -> FrontLink[ToFront]:
        """The API process's end."""
        return FrontLink[ToFront](sock, ToFront)

    def send(self, message: ToFront | ToParent, passed: socket.socket | None = None) -> None:
        """Queue a message; does not wait. If the other end has gone, nothing happens.

        Args:
            passed: goes with it, and is closed here.
        """
        self._unsent.append((encode_frame(message), passed))
        if self._has_ended:
            self._drop_unsent()
        elif len(self._unsent) > MAX_UNSENT:
            self._break("the other end of a link to an API process does not read")
        elif len(self._unsent) == 1:
            self._flush()

    def take_socket(self) -> socket.socket:
        """The socket that came with the message that was iterated over last, which must be one that brings one.

        Raises:
            TransportError: there is none.
        """
        if not self._sockets:
            raise TransportError("a socket to a worker did not arrive")
        return self._sockets.popleft()

    def __aiter__(self) -> FrontLink[Incoming]:
        return self

    async def __anext__(self) -> Incoming:
        while not self._messages:
            if self._has_ended:
                raise StopAsyncIteration
            self._has_come.clear()
            await self._has_come.wait()
        return self._messages.popleft()

    def close(self) -> None:
        """Hang up, whatever is unsent. Idempotent."""
        if self._socket.fileno() >= 0:
            self._end()
            self._socket.close()
            while self._sockets:
                self._sockets.popleft().close()

    def _read(self) -> None:
        try:
            data, descriptors, flags, _ = socket.recv_fds(self._socket, _CHUNK, _MAX_SOCKETS, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except ConnectionError:
            data, descriptors, flags = b"", [], 0
        # A descriptor comes with the first byte of its message, so that it is here before the message is whole.
        self._sockets.extend(socket.socket(fileno=fd) for fd in descriptors)
        try:
            self._messages.extend(self._decoder.decode(body) for body in self._frames.feed(data))
        except (TransportError, msgspec.MsgspecError) as error:
            self._break(f"an API process and the server do not understand each other: {error}")
        self._has_come.set()
        if flags & socket.MSG_CTRUNC:
            self._break("a socket to a worker was lost: there are too many open files")
        elif not data:
            self._end()

    def _flush(self) -> None:
        try:
            while self._unsent:
                frame, passed = self._unsent[0]
                count = socket.send_fds(self._socket, [frame], [] if passed is None else [passed.fileno()])
                if passed is not None:
                    passed.close()
                self._unsent[0] = (frame[count:], None)
                if count == len(frame):
                    self._unsent.popleft()
        except BlockingIOError:
            self._loop.add_writer(self._socket.fileno(), self._flush)
        except ConnectionError:
            self._end_of_writing()
        except OSError as error:
            self._break(f"a link to an API process cannot be written to: {error}")
        else:
            self._loop.remove_writer(self._socket.fileno())

    def _drop_unsent(self) -> None:
        while self._unsent:
            _, passed = self._unsent.popleft()
            if passed is not None:
                passed.close()

    def _end_of_writing(self) -> None:
        """The other end has gone: what it has said before is still to be read."""
        self._drop_unsent()
        self._loop.remove_writer(self._socket.fileno())

    def _break(self, reason: str) -> None:
        logger.error("%s: it is given up", reason)
        self._messages.clear()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._end()

    def _end(self) -> None:
        """Nothing more will come, or go."""
        self._has_ended = True
        self._has_come.set()
        with contextlib.suppress(OSError):
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())
        self._drop_unsent()

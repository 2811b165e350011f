"""The control channel between the server and one worker: msgspec messages over a Unix stream socket pair.

A frame is its length (u32, little endian) and one msgpack message. `SocketControlPort` is the worker's end and never
blocks; `AsyncControlChannel` is the server's. Neither loses a message: unsent bytes are kept and go out as soon as the
socket takes them. Only signs of life are left out while many of them lie unsent: nobody asks for them, so nothing else
would bound what they take when a server is suspended overnight, and each tells all that those before it did.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import struct
import threading
from collections import deque
from collections.abc import AsyncIterator

import msgspec

from amoe.engine.messages import Alive, Heartbeat, Pulse, Stop, ToServer, ToWorker
from amoe.errors import TransportError

MAX_FRAME_BYTES = 64 << 20
_LENGTH = struct.Struct("<I")
MAX_UNSENT_SIGNS = 64  # of about 9 seconds: whoever reads at all, however late, gets one after the other
_CHUNK = 1 << 16

_encoder = msgspec.msgpack.Encoder()


def encode_frame(message: msgspec.Struct) -> bytearray:
    """The frame of `message`.

    Raises:
        TransportError: it is larger than `MAX_FRAME_BYTES`.
    """
    frame = bytearray(_LENGTH.size)
    _encoder.encode_into(message, frame, _LENGTH.size)
    length = len(frame) - _LENGTH.size
    if length > MAX_FRAME_BYTES:
        raise TransportError(f"a control message of {length} bytes is larger than {MAX_FRAME_BYTES}")
    _LENGTH.pack_into(frame, 0, length)
    return frame


class FrameReader:
    """Cuts a stream of bytes into messages' bodies, however the stream was chunked."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytearray]:
        """Take the next bytes of the stream; returns the bodies that are complete now.

        Raises:
            TransportError: the stream is not made of frames.
        """
        buffer = self._buffer
        buffer += data
        bodies = []
        start = 0
        while len(buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, start)
            if length > MAX_FRAME_BYTES:
                raise TransportError(f"the control channel announces a message of {length} bytes: it is out of step")
            end = start + _LENGTH.size + length
            if end > len(buffer):
                break
            bodies.append(buffer[start + _LENGTH.size : end])
            start = end
        del buffer[:start]
        return bodies


class SocketControlPort:
    """A worker's end. See `amoe.engine.messages.ControlPort`. `send` may be called from another thread.

    Args:
        sock: a connected stream socket, owned from now on.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._socket.setblocking(False)
        self._reader = FrameReader()
        self._decoder: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
        self._unsent = bytearray()
        self._num_sent = 0  # bytes so far
        self._signs: deque[int] = deque()  # ends of the signs of life that may not have been sent, counted alike
        self._sending = threading.Lock()  # over all that is unsent, and the way out
        self._wants_write = False  # the descriptor is readable when the socket takes bytes
        self._gone = False  # the server has closed its end
        self._stop_delivered = False
        # One descriptor for the worker's select, whether the socket has bytes, takes bytes again or `interrupt` rang.
        self._interrupted = False
        self._alarm = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._socket, select.EPOLLIN)
        self._epoll.register(self._alarm, select.EPOLLIN)

    def receive(self) -> list[ToWorker]:
        """Messages that have come since the last call. After the server has gone, or `interrupt`: one final `Stop`.

        Raises:
            TransportError: the server broke the protocol.
        """
        if self._unsent and not self._gone:
            with self._sending:
                self._flush()
        messages: list[ToWorker] = []
        while not self._gone:
            try:
                data = self._socket.recv(_CHUNK)
            except BlockingIOError:
                break
            except ConnectionError:
                data = b""
            if not data:
                self._lose_server()
                break
            messages += [self._decode(body) for body in self._reader.feed(data)]
            if len(data) < _CHUNK:
                break  # that was all: spares the call that would say so
        if (self._gone or self._interrupted) and not self._stop_delivered:
            self._stop_delivered = True
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._alarm)
            messages.append(Stop())
        return messages

    def send(self, message: ToServer) -> None:
        """Queue a message and send what the socket takes. To a server that has gone: nothing happens."""
        if self._gone:
            return
        frame = encode_frame(message)
        with self._sending:
            if self._gone or (isinstance(message, Heartbeat | Alive | Pulse) and not self._admits_sign(len(frame))):
                return
            had_unsent = bool(self._unsent)
            self._unsent += frame
            if not had_unsent:
                self._flush()

    def _admits_sign(self, num_bytes: int) -> bool:
        """Whether a sign of life of so many bytes may be queued now: count it, if it may."""
        signs = self._signs
        while signs and signs[0] <= self._num_sent:
            signs.popleft()
        if len(signs) >= MAX_UNSENT_SIGNS:
            return False
        signs.append(self._num_sent + len(self._unsent) + num_bytes)
        return True

    def fileno(self) -> int:
        return self._epoll.fileno()

    def interrupt(self) -> None:
        """Let `receive` end with a `Stop` as if the server had gone. May be called from a signal handler."""
        self._interrupted = True
        os.eventfd_write(self._alarm, 1)

    def close(self, timeout_s: float = 5.0) -> None:
        """Send what is left, waiting at most `timeout_s` for a server that does not read, and close. Idempotent."""
        if self._epoll.closed:
            return
        self._socket.settimeout(timeout_s)
        with contextlib.suppress(OSError):
            self._socket.sendall(self._unsent)
        self._epoll.close()
        os.close(self._alarm)
        self._socket.close()

    def _decode(self, body: bytearray) -> ToWorker:
        try:
            return self._decoder.decode(body)
        except msgspec.MsgspecError as error:
            raise TransportError(f"the server sent what is not a message: {error}") from error

    def _flush(self) -> None:
        try:
            sent = self._socket.send(self._unsent)
        except BlockingIOError:
            sent = 0
        except OSError:
            # Its last words may still be readable; `receive` finds the end of the stream behind them.
            sent = len(self._unsent)
        del self._unsent[:sent]
        self._num_sent += sent
        if bool(self._unsent) != self._wants_write:
            self._wants_write = not self._wants_write
            self._epoll.modify(self._socket, select.EPOLLIN | (select.EPOLLOUT if self._wants_write else 0))

    def _lose_server(self) -> None:
        with self._sending:  # another thread may be on its way out
            self._gone = True
            self._unsent.clear()
            # An ended stream stays readable for ever, which would make the descriptor useless.
            self._epoll.unregister(self._socket)


class AsyncControlChannel:
    """The server's end: `send`, and iteration over the worker's messages until it has gone. Make it with `open`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._frames = FrameReader()
        self._decoder: msgspec.msgpack.Decoder[ToServer] = msgspec.msgpack.Decoder(ToServer)
        self._decoded: deque[ToServer] = deque()

    @classmethod
    async def open(cls, sock: socket.socket) -> AsyncControlChannel:
        """Take over `sock`, a connected Unix stream socket."""
        reader, writer = await asyncio.open_unix_connection(sock=sock, limit=1 << 20)
        return cls(reader, writer)

    def send(self, message: ToWorker) -> None:
        """Queue a message; does not wait.

        Raises:
            BrokenPipeError: the worker has gone.
        """
        if self._writer.is_closing() or self._reader.at_eof():
            raise BrokenPipeError("the worker has gone")
        self._writer.write(encode_frame(message))

    def __aiter__(self) -> AsyncIterator[ToServer]:
        return self

    async def __anext__(self) -> ToServer:
        """The next message. Cancelling loses none.

        Raises:
            TransportError: the worker broke the protocol.
        """
        while not self._decoded:
            # Bytes that are here already would be read without a pause: whoever got the last ones has to get them out.
            await asyncio.sleep(0)
            try:
                data = await self._reader.read(_CHUNK)
            except ConnectionError:  # killed with our messages unread
                data = b""
            if not data:
                raise StopAsyncIteration
            try:
                self._decoded.extend(self._decoder.decode(body) for body in self._frames.feed(data))
            except msgspec.MsgspecError as error:
                raise TransportError(f"a worker sent what is not a message: {error}") from error
        return self._decoded.popleft()

    def abort(self) -> None:
        """Hear and say nothing more, from now on; what has not been sent is dropped, which to a host that is cut off
        may be something. `close` still gives the socket back."""
        self._writer.transport.abort()

    async def close(self) -> None:
        """Close the socket, which tells the worker to stop. Idempotent."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

"""The server's end of a control socket, without an event loop."""

from __future__ import annotations

import socket

import msgspec

from amoe.engine.control import FrameReader, encode_frame
from amoe.engine.messages import ToServer, ToWorker


class Peer:
    """Sends messages at once, and takes what has come."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._socket.setblocking(False)
        self._reader = FrameReader()
        self._decoder = msgspec.msgpack.Decoder(ToServer)

    def send(self, message: ToWorker) -> None:
        self._socket.sendall(encode_frame(message))

    def receive(self) -> list[ToServer]:
        try:
            data = self._socket.recv(1 << 20)
        except BlockingIOError:
            return []
        return [self._decoder.decode(body) for body in self._reader.feed(data)]

    def close(self) -> None:
        self._socket.close()

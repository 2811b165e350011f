"""uvicorn's fast HTTP parser, with limits: heads have a size and a time. And clients that go are noticed at once."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from amoe.server.encoding import json_bytes
from amoe.server.errors import error_body

MAX_HEAD_BYTES = 64 * 1024
HEAD_TIMEOUT_S = 20.0
LINGER_S = 2.0
# For a client to take anything of what waits for it. The system keeps some megabytes more, and asks for the next only
# when a good part of them is gone: a reader of some kilobytes a second still counts as one.
READ_TIMEOUT_S = 120.0
_TOO_LARGE = f"the head of the request is larger than {MAX_HEAD_BYTES} bytes"


class LimitedHttpProtocol(HttpToolsProtocol):
    """Refuses heads of more than `MAX_HEAD_BYTES`, and closes connections whose head does not come in
    time, or whose answer is not read.

    The parser itself would collect headers, and trailers behind a chunked body, for ever. What it cannot read is
    answered in the one shape of errors.
    """

    _head_bytes: int | None = 0  # of the head that is coming in; None: there is none
    _mute_bytes = 0  # since the parser has last told of a body or its end: of a trailer, say, which it collects
    _head_timer: asyncio.TimerHandle | None = None
    _is_refused = False  # what else comes in is thrown away
    _stall_timer: asyncio.TimerHandle | None = None  # while more waits for the client than the socket takes
    _serving: RequestResponseCycle | None = None  # `cycle` is the last request, which may wait behind this one

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        self._forget_stall()
        self._abandon()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader(None)

    def resume_writing(self) -> None:
        self._forget_stall()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        if self._head_bytes is not None:
            self._head_bytes += len(data)
        self._mute_bytes += len(data)
        super().data_received(data)
        # After the parser has seen it: most heads come in one piece, together with their body.
        num_kept = self._mute_bytes if self._head_bytes is None else self._head_bytes
        if num_kept > MAX_HEAD_BYTES:
            self._refuse(431, _TOO_LARGE)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._head_bytes is None:
            self._expect_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._head_bytes is None:  # a trailer, which nobody will read
            self._mute_bytes = 0
            return
        super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._mute_bytes = 0
        super().on_body(body)

    def on_headers_complete(self) -> None:
        self._mute_bytes = 0
        self._forget_head()
        if sum(len(name) + len(value) for name, value in self.headers) + len(self.url) > MAX_HEAD_BYTES:
            self._refuse(431, _TOO_LARGE)
            return
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """The request is no HTTP."""
        self._refuse(400, "this is no HTTP request that can be understood")

    def _watch_reader(self, num_before: int | None) -> None:
        """Cut off a client that reads nothing: its answer would stay in memory for as long as it likes.

        Args:
            num_before: bytes that waited for it `READ_TIMEOUT_S` ago; None: it had none to wait.
        """
        num_waiting = self.transport.get_write_buffer_size()  # nothing is added while writing is paused
        if num_before is not None and num_waiting >= num_before:
            self.transport.abort()
            return
        self._stall_timer = self.loop.call_later(READ_TIMEOUT_S, self._watch_reader, num_waiting)

    def _forget_stall(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _expect_head(self) -> None:
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._give_up)

    def _forget_head(self) -> None:
        self._head_bytes = None
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        if self._is_refused or self.transport.is_closing():
            return
        self._is_refused = True
        self._forget_head()
        # If a request is being served, what follows it, or its own body, is wrong: its client counts as gone.
        if self._abandon():
            self.transport.close()
            return
        body = json_bytes(error_body(message, status))
        phrase = {400: b"Bad Request", 431: b"Request Header Fields Too Large"}[status]
        head: list[Any] = [
            b"HTTP/1.1 %d %s\r\n" % (status, phrase),
            b"content-type: application/json\r\n",
            b"content-length: %d\r\n" % len(body),
            b"connection: close\r\n\r\n",
        ]
        self.transport.write(b"".join([*head, body]))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        # Not at once: to close a socket with bytes unread resets the connection, and may take the answer along.
        self.loop.call_later(LINGER_S, self._give_up)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._serving = cycle
        super()._start_asgi_task(cycle, app)

    def _abandon(self) -> bool:
        """The client of the request that is being served has gone; uvicorn would tell so to the last one that came.

        Returns:
            Whether a part of its answer has been sent.
        """
        cycle = self._serving
        if cycle is None or cycle.response_complete:
            return False
        cycle.disconnected = True
        cycle.message_event.set()
        return cycle.response_started

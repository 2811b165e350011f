"""A worker's control channel when several API processes send it requests, beside the parent that started it.

Each front end has a socket of its own to each worker, so that no process relays tokens for the others. The parent puts
them through the worker's *door*, whenever a front end comes. Requests are told apart by their numbers: front end f
numbers its own from f * `REQUESTS_PER_FRONT` on, and no two lives of an API process are the same front end.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from collections import defaultdict

from amoe.engine.control import SocketControlPort
from amoe.engine.messages import (
    AbortRequests,
    AddRequest,
    Applied,
    Holding,
    LayerHeld,
    Loading,
    Outputs,
    Ready,
    Stop,
    ToServer,
    ToWorker,
    Unanswered,
)

REQUESTS_PER_FRONT = 1 << 40  # a million requests per second for twelve days; any sum of them fits an int64
_NUMBER = struct.Struct("<Q")  # of a front end, as it comes through the door


def front_of(request_id: int) -> int:
    """Number of the front end that has numbered a request."""
    return request_id // REQUESTS_PER_FRONT


def door_pair() -> tuple[socket.socket, socket.socket]:
    """A door: the parent's side and the worker's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    return ours, theirs


def put_through(door: socket.socket, front: int) -> socket.socket:
    """Connect a front end with the worker behind a door; returns the front end's socket. If the worker has gone, or
    takes nobody any more, the socket has ended."""
    ours, theirs = socket.socketpair()
    with theirs, contextlib.suppress(OSError):
        socket.send_fds(door, [_NUMBER.pack(front)], [theirs.fileno()])
    return ours


class SharedControlPort:
    """See `amoe.engine.messages.ControlPort`. One that has lost a front end frees what that one had open.

    Only the worker's loop may send outputs; anything else may come from another thread.

    Args:
        parent: to whoever starts and stops the worker.
        door: the worker's side, owned from now on.
    """

    def __init__(self, parent: SocketControlPort, door: socket.socket) -> None:
        self._parent = parent
        self._door = door
        self._door.setblocking(False)
        self._fronts: dict[int, SocketControlPort] = {}
        self._open: dict[int, set[int]] = {}  # requests, by front end
        self._epoll = select.epoll()
        for port in (parent, door):
            self._epoll.register(port.fileno(), select.EPOLLIN)

    def receive(self) -> list[ToWorker]:
        """Messages that have come since the last call, of all; after the parent has gone: one final `Stop`.

        What a front end asks for may rely on what the parent has said before. So the parent is listened to last, when
        all that came before is there, and its messages go first.

        Raises:
            TransportError: somebody broke the protocol.
        """
        ready = {fd for fd, _ in self._epoll.poll(0)}
        if self._door.fileno() in ready:
            self._let_in()
        messages: list[ToWorker] = []
        for front, port in list(self._fronts.items()):
            if port.fileno() in ready:
                for message in port.receive():
                    messages += self._of_front(front, message)
        return self._parent.receive() + messages

    def _let_in(self) -> None:
        """Take whoever stands before the door."""
        with contextlib.suppress(BlockingIOError):
            while True:
                data, descriptors, _, _ = socket.recv_fds(self._door, _NUMBER.size, 1, socket.MSG_CMSG_CLOEXEC)
                if not data:  # the parent has gone, which its own channel tells as well
                    self._epoll.unregister(self._door.fileno())
                    return
                if not descriptors:  # this process has too many: the front end finds its end closed
                    continue
                (front,) = _NUMBER.unpack(data)
                port = SocketControlPort(socket.socket(fileno=descriptors[0]))
                self._epoll.register(port.fileno(), select.EPOLLIN)
                self._open[front] = set()
                self._fronts[front] = port

    def _of_front(self, front: int, message: ToWorker) -> list[ToWorker]:
        if isinstance(message, AddRequest):
            self._open[front].add(message.request_id)
        elif isinstance(message, Stop):  # the front end has gone: nobody reads what it has asked for
            return self._forget(front)
        return [message]

    def _forget(self, front: int) -> list[ToWorker]:
        port, orphans = self._fronts.pop(front), sorted(self._open.pop(front))
        self._epoll.unregister(port.fileno())
        port.close(0)
        return [AbortRequests(orphans)] if orphans else []

    def send(self, message: ToServer) -> None:
        """Queue a message to those whom it concerns: outputs to who asked, what a supervisor has asked for to the
        parent, all else (signs of life, failures) to all."""
        if isinstance(message, Outputs):
            self._send_outputs(message)
            return
        self._parent.send(message)
        if not isinstance(message, Loading | Ready | Applied | Holding | LayerHeld | Unanswered):
            for port in tuple(self._fronts.values()):
                port.send(message)

    def _send_outputs(self, message: Outputs) -> None:
        by_front: dict[int, Outputs] = defaultdict(lambda: Outputs([], [], []))
        for output in message.outputs:
            front = front_of(output.request_id)
            by_front[front].outputs.append(output)
            if output.finish_reason is not None and front in self._open:
                self._open[front].discard(output.request_id)
        for request_id, token_id in zip(message.request_ids, message.token_ids, strict=True):
            own = by_front[front_of(request_id)]
            own.request_ids.append(request_id)
            own.token_ids.append(token_id)
        for front, own in by_front.items():
            if (port := self._fronts.get(front)) is not None:
                port.send(own)

    def fileno(self) -> int:
        return self._epoll.fileno()

    def interrupt(self) -> None:
        """Let `receive` end with a `Stop`. May be called from a signal handler."""
        self._parent.interrupt()

    def close(self, timeout_s: float = 5.0) -> None:
        """Send what is left, the parent's part first, and close, all within `timeout_s`. Idempotent."""
        if self._epoll.closed:
            return
        self._epoll.close()
        deadline = time.monotonic() + timeout_s
        for port in (self._parent, *self._fronts.values()):
            port.close(max(0.0, deadline - time.monotonic()))
        self._door.close()


def control_port(control_fd: int, door_fd: int | None) -> SocketControlPort | SharedControlPort:
    """The port over inherited descriptors; without a door the parent is the only front end."""
    parent = SocketControlPort(socket.socket(fileno=control_fd))
    return parent if door_fd is None else SharedControlPort(parent, socket.socket(fileno=door_fd))

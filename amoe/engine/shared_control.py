"""A worker's control channel when several API processes send it requests, beside the parent that started it.

Each front end has a socket of its own to each worker, so that no process relays tokens for the others. Requests are
told apart by their numbers: front end f numbers its own from f * `REQUESTS_PER_FRONT` on.
"""

from __future__ import annotations

import select
import socket
from collections import defaultdict
from collections.abc import Sequence

from amoe.engine.control import SocketControlPort
from amoe.engine.messages import (
    AbortRequests,
    AddRequest,
    Heartbeat,
    Loading,
    Outputs,
    Pulse,
    Ready,
    Stop,
    ToServer,
    ToWorker,
)

REQUESTS_PER_FRONT = 1 << 40  # a million requests per second for twelve days; any sum of them fits an int64


def front_of(request_id: int) -> int:
    """Index of the front end that has numbered a request."""
    return request_id // REQUESTS_PER_FRONT


class SharedControlPort:
    """See `amoe.engine.messages.ControlPort`. One that has lost a front end frees what that one had open.

    Only the worker's loop may send outputs; anything else may come from another thread.

    Args:
        parent: to whoever starts and stops the worker.
        fronts: to the API processes, by index.
    """

    def __init__(self, parent: SocketControlPort, fronts: Sequence[SocketControlPort]) -> None:
        self._parent = parent
        self._fronts = tuple(fronts)
        self._open: list[set[int]] = [set() for _ in fronts]
        self._epoll = select.epoll()
        for port in (parent, *fronts):
            self._epoll.register(port.fileno(), select.EPOLLIN)

    def receive(self) -> list[ToWorker]:
        """Messages that have come since the last call, of all; after the parent has gone: one final `Stop`.

        Raises:
            TransportError: somebody broke the protocol.
        """
        messages: list[ToWorker] = []
        for front, port in enumerate(self._fronts):
            for message in port.receive():
                messages += self._of_front(front, message)
        return messages + self._parent.receive()

    def _of_front(self, front: int, message: ToWorker) -> list[ToWorker]:
        if isinstance(message, AddRequest):
            self._open[front].add(message.request_id)
        elif isinstance(message, Stop):  # the front end has gone: nobody reads what it has asked for
            orphans = sorted(self._open[front])
            self._open[front].clear()
            return [AbortRequests(orphans)] if orphans else []
        return [message]

    def send(self, message: ToServer) -> None:
        """Queue a message to those whom it concerns: outputs to who asked, a start to the parent, all else to all."""
        if isinstance(message, Outputs):
            self._send_outputs(message)
            return
        if not isinstance(message, Heartbeat | Pulse):
            self._parent.send(message)
        if not isinstance(message, Loading | Ready):
            for port in self._fronts:
                port.send(message)

    def _send_outputs(self, message: Outputs) -> None:
        by_front: dict[int, Outputs] = defaultdict(lambda: Outputs([], [], []))
        for output in message.outputs:
            front = front_of(output.request_id)
            by_front[front].outputs.append(output)
            if output.finish_reason is not None:
                self._open[front].discard(output.request_id)
        for request_id, token_id in zip(message.request_ids, message.token_ids, strict=True):
            own = by_front[front_of(request_id)]
            own.request_ids.append(request_id)
            own.token_ids.append(token_id)
        for front, own in by_front.items():
            self._fronts[front].send(own)

    def fileno(self) -> int:
        return self._epoll.fileno()

    def interrupt(self) -> None:
        """Let `receive` end with a `Stop`. May be called from a signal handler."""
        self._parent.interrupt()

    def close(self, timeout_s: float = 5.0) -> None:
        """Send what is left and close. Idempotent."""
        if self._epoll.closed:
            return
        self._epoll.close()
        for port in (*self._fronts, self._parent):
            port.close(timeout_s)


def control_port(control_fd: int, front_fds: Sequence[int]) -> SocketControlPort | SharedControlPort:
    """The port over inherited descriptors; without front ends the parent is the one."""
    parent, *fronts = (SocketControlPort(socket.socket(fileno=fd)) for fd in (control_fd, *front_fds))
    return SharedControlPort(parent, fronts) if fronts else parent

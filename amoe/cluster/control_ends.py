"""The sockets between the server and a worker process of the same host."""

from __future__ import annotations

import socket
from types import TracebackType

from amoe.cluster.process import InheritedControl
from amoe.engine.shared_control import door_pair


class ControlEnds:
    """Both ends of a control channel, and of a door. Within a `with` block a process may be started that inherits
    `descriptors`; after it only the server's ends are open, and none if the block has raised.

    Args:
        with_door: API processes will talk to the worker themselves, see `amoe.engine.shared_control`.

    Attributes:
        control, door: the server's ends.
        inherited: the worker's.
    """

    def __init__(self, *, with_door: bool) -> None:
        self.control, theirs = socket.socketpair()
        self.door: socket.socket | None = None
        self._theirs = [theirs]
        if with_door:
            self.door, door = door_pair()
            self._theirs.append(door)
        self.inherited = InheritedControl(*self.descriptors)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What the process has to inherit, under the same numbers."""
        return tuple(each.fileno() for each in self._theirs)

    def close(self) -> None:
        """Close the server's ends. Idempotent."""
        self.control.close()
        if self.door is not None:
            self.door.close()

    def __enter__(self) -> ControlEnds:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for each in self._theirs:
            each.close()
        if kind is not None:
            self.close()

"""Wire buffers that are used again: to make one costs more than to fill it."""

from __future__ import annotations

from collections import deque

from amoe.transport.record_size import ALIGNMENT
from amoe.transport.wire import WireBuffer

_MOST_KEPT_BYTES = 32 << 20


class BufferPool:
    """Buffers in sizes of powers of two. Any thread may take and give.

    Args:
        least_bytes: size of the smallest.
    """

    def __init__(self, least_bytes: int) -> None:
        self._least_bytes = max(ALIGNMENT, least_bytes)
        self._free: dict[int, deque[WireBuffer]] = {}
        self._kept_bytes = 0  # roughly: threads may race for it, and it only bounds memory

    def take(self, nbytes: int) -> WireBuffer:
        """One of at least `nbytes`, with anything in it."""
        size = self._least_bytes
        while size < nbytes:
            size *= 2
        try:
            buffer = self._free[size].pop()
        except (KeyError, IndexError):
            return WireBuffer.allocate(size)
        self._kept_bytes -= size
        return buffer

    def give(self, buffer: WireBuffer) -> None:
        """Whoever took it uses it no more."""
        if self._kept_bytes + buffer.nbytes <= _MOST_KEPT_BYTES:
            self._kept_bytes += buffer.nbytes
            self._free.setdefault(buffer.nbytes, deque()).append(buffer)

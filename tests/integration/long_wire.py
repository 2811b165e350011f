"""A wire between two hosts: carries packets from one TUN device to another, late or not at all.

Usage: long_wire.py FD FD, of the two devices. Each line of standard input is an order, answered by `ok`:

    delay SECONDS   each packet comes so much later, from the next one on
    cut             whatever is on the wire vanishes, and whatever is sent; nobody is told
    heal            no more
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections import deque

PACKET_BYTES = 1 << 16
MOST_AT_ONCE = 64


class Way:
    """What goes from one device to the other."""

    def __init__(self, source: int, target: int) -> None:
        self.source = source
        self._target = target
        self._under_way: deque[tuple[float, bytes]] = deque()

    def take(self, due: float | None) -> None:
        """Read what was sent; it arrives at `due`, or never."""
        for _ in range(MOST_AT_ONCE):
            try:
                packet = os.read(self.source, PACKET_BYTES)
            except BlockingIOError:
                return
            if due is not None:
                self._under_way.append((due, packet))

    def give(self, now: float) -> float | None:
        """Write what is due; returns when the next packet is."""
        while self._under_way and self._under_way[0][0] <= now:
            with contextlib.suppress(OSError):  # the device is down: as on any wire, that packet is lost
                os.write(self._target, self._under_way[0][1])
            self._under_way.popleft()
        return self._under_way[0][0] if self._under_way else None

    def clear(self) -> None:
        self._under_way.clear()


class Wire:
    """Both ways, and what is done to them."""

    def __init__(self, one: int, other: int) -> None:
        self.ways = (Way(one, other), Way(other, one))
        self._delay_s = 0.0
        self._is_cut = False

    def obey(self, order: str, *arguments: str) -> None:
        if order == "delay":
            self._delay_s = float(arguments[0])
        else:
            self._is_cut = order == "cut"
        if self._is_cut:
            for way in self.ways:
                way.clear()

    def take(self, source: int) -> None:
        due = None if self._is_cut else time.monotonic() + self._delay_s
        next(way for way in self.ways if way.source == source).take(due)

    def give(self) -> float | None:
        """Returns for how long nothing is due."""
        now = time.monotonic()
        dues = [due for way in self.ways if (due := way.give(now)) is not None]
        return max(0.0, min(dues) - now) if dues else None


def main() -> None:
    one, other = int(sys.argv[1]), int(sys.argv[2])
    wire = Wire(one, other)
    orders = sys.stdin
    while True:
        readable = select.select([one, other, orders], [], [], wire.give())[0]
        if orders in readable:
            line = orders.readline()
            if not line:
                return
            wire.obey(*line.split())
            print("ok", flush=True)
        for device in (one, other):
            if device in readable:
                wire.take(device)


main()

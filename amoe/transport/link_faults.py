"""Links that are cut and slow by order from outside: what tests of failures steer `FaultyTransport` with."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import msgspec

READ_INTERVAL_S = 0.02
_CLOCK_MONOTONIC = 1


class LinkFaults(msgspec.Struct, frozen=True):
    """What is wrong with the links of some workers, by rank.

    Attributes:
        cut: nothing passes between these and any other.
        delay_s: what goes to or comes from these arrives so many seconds late; the greater delay of two counts.
    """

    cut: frozenset[int] = frozenset()
    delay_s: dict[int, float] = msgspec.field(default_factory=dict)

    def is_cut(self, own: int, peer: int) -> bool:
        """Nothing passes between the two."""
        return own in self.cut or peer in self.cut

    def delay_between(self, own: int, peer: int) -> float:
        """Seconds."""
        return max(self.delay_s.get(own, 0.0), self.delay_s.get(peer, 0.0))


class SteeringFile:
    """A file of JSON, `{"cut": [2], "delay_s": {"3": 0.05}}`, that is replaced as a whole when things change."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._next_read = 0.0
        self._faults = LinkFaults()

    def read(self, now: float) -> LinkFaults:
        """What it says, or said not long ago. No file: nothing is wrong.

        Raises:
            msgspec.DecodeError: it is wrong itself.
        """
        if now >= self._next_read:
            self._next_read = now + READ_INTERVAL_S
            try:
                self._faults = msgspec.json.decode(self._path.read_bytes(), type=LinkFaults)
            except FileNotFoundError:
                self._faults = LinkFaults()
        return self._faults


class _TimerSpec(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("interval_s", "interval_ns", "value_s", "value_ns")]


class Timer:
    """A descriptor that becomes readable at a time, and stays so until the timer is set again (a timerfd)."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.fd: int = self._libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")

    def set(self, at: float | None) -> None:
        """To the time `at` of `time.monotonic`; None: never."""
        nanoseconds = 0 if at is None else max(1, int(at * 1e9))
        spec = _TimerSpec(0, 0, *divmod(nanoseconds, 10**9))
        if self._libc.timerfd_settime(self.fd, 1, ctypes.byref(spec), None) < 0:  # 1: absolute
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def close(self) -> None:
        os.close(self.fd)

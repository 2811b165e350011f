"""Two hosts and the wire between them: network namespaces of this machine, with a TUN device each.

The wire is a process that carries packets from one device to the other (`long_wire.py`), since a kernel may know
nothing of delays: that takes a module of its own, `netem`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

NET = f"10.213.{os.getpid() % 256}"  # of this run's own
HERE, THERE = f"{NET}.1", f"{NET}.2"
_WIRE = Path(__file__).parent / "integration" / "long_wire.py"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def _tun(name: str) -> int:
    """The descriptor of a new device, which lives as long as that is open."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return device


class Network:
    """This namespace and one more.

    Attributes:
        prefix: of a command that runs in the other one.
    """

    def __init__(self) -> None:
        self._space = f"amoe-{os.getpid()}"
        self._near, self._far = f"amoe{os.getpid() % 10**6}a", f"amoe{os.getpid() % 10**6}b"
        self._wire: subprocess.Popen[str] | None = None
        self.prefix = ("ip", "netns", "exec", self._space)

    def open(self) -> None:
        """
        Raises:
            OSError, subprocess.CalledProcessError: that cannot be had here.
        """
        with contextlib.ExitStack() as devices:
            fds = []
            for name in (self._near, self._far):
                fds.append(_tun(name))
                devices.callback(os.close, fds[-1])
            ip("netns", "add", self._space)
            ip("link", "set", self._far, "netns", self._space)
            ip("addr", "add", f"{HERE}/30", "dev", self._near)
            ip("link", "set", self._near, "up")
            for arguments in (
                ("addr", "add", f"{THERE}/30", "dev", self._far),
                ("link", "set", self._far, "up"),
                ("link", "set", "lo", "up"),
            ):
                ip("-n", self._space, *arguments)
            self._wire = subprocess.Popen(
                [sys.executable, str(_WIRE), *map(str, fds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                pass_fds=fds,
            )

    def cut(self) -> None:
        """Whatever is sent vanishes, and nobody is told."""
        self._order("cut")

    def heal(self) -> None:
        self._order("heal")

    def delay(self, seconds: float) -> None:
        """Whatever is sent arrives so much later."""
        self._order(f"delay {seconds}")

    def kill_there(self) -> None:
        """kill -9 of all that runs in the other one."""
        for pid in map(int, ip("netns", "pids", self._space).split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        if self._wire is not None:
            self._wire.communicate()
        subprocess.run(["ip", "netns", "del", self._space], check=False, capture_output=True)

    def _order(self, order: str) -> None:
        assert self._wire is not None and self._wire.stdin is not None and self._wire.stdout is not None
        self._wire.stdin.write(order + "\n")
        self._wire.stdin.flush()
        assert self._wire.stdout.readline() == "ok\n"


@contextlib.contextmanager
def two_hosts() -> Iterator[Network]:
    """This one and another; nothing of it is left afterwards. The test is skipped where there can be none."""
    network = Network()
    try:
        network.open()
    except (OSError, subprocess.CalledProcessError) as error:
        network.close()
        pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', None) or error}")
    try:
        yield network
    finally:
        network.close()

"""What a server holds while it has nothing to do, as the kernel tells it: what has grown afterwards has leaked."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil

_NUMBER = re.compile(r":\[\d+\]$")  # of a socket or pipe: other ones have others
_TITLE_LEN = 60
_NUM_LOOKS = 10
_BETWEEN_LOOKS_S = 0.013


@dataclass(frozen=True, slots=True)
class Residue:
    """What a server holds while it has nothing to do.

    Attributes:
        processes: titles of its workers, and of other children; sorted.
        descriptors: of each process, by title: how many there are of what.
        names: in /dev/shm.
        memory_mib: resident, of all processes together.
        held: KV cache, token slots and requests, summed over the workers: 0 is right.
    """

    processes: tuple[str, ...]
    descriptors: dict[str, Counter[str]]
    names: frozenset[str]
    memory_mib: float
    held: float

    def leaks(self, before: Residue) -> list[str]:
        """What is there that was not there before; for a person."""
        found = []
        if self.processes != before.processes:
            found.append(f"processes {self.processes}, before: {before.processes}")
        for title, now in self.descriptors.items():
            then = before.descriptors.get(title, now)
            if now.total() > then.total():
                more = ", ".join(f"{count} x {what}" for what, count in sorted((now - then).items()))
                less = ", ".join(f"{count} x {what}" for what, count in sorted((then - now).items()))
                exchanged = f"; no more: {less}" if less else ""
                found.append(f"{title} has {now.total()} descriptors, before: {then.total()}; new: {more}{exchanged}")
        if self.names - before.names:
            found.append(f"in /dev/shm: {sorted(self.names - before.names)}")
        if self.held:
            found.append(f"KV cache, token slots or requests are held: {self.held:g}")
        return found


def children_of(pid: int) -> list[tuple[str, psutil.Process]]:
    """All processes below one, with their titles, `amoe: expert 0`. One that has ended and that nobody has asked after
    is called a zombie, whatever it was."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            found.append((" ".join(child.cmdline()).strip()[:_TITLE_LEN], child))
        except psutil.ZombieProcess:
            found.append(("zombie", child))
        except psutil.NoSuchProcess:
            continue
    return found


def look_at(processes: Sequence[tuple[str, psutil.Process]], held: float) -> Residue:
    """What these processes hold now, by title.

    Args:
        held: see `Residue`.
    """
    return Residue(
        tuple(sorted(title for title, _ in processes)),
        {title: lasting_descriptors(process.pid) for title, process in processes},
        frozenset(os.listdir("/dev/shm")),
        sum(map(_resident_mib, processes)),
        held,
    )


def _resident_mib(process: tuple[str, psutil.Process]) -> float:
    try:
        return process[1].memory_info().rss / 2**20
    except psutil.NoSuchProcess:
        return 0.0


def lasting_descriptors(pid: int) -> Counter[str]:
    """Without what is open for a moment only: a worker reads now and then which of its links are cut."""
    looks = []
    for _ in range(_NUM_LOOKS):
        looks.append(descriptors(pid))
        time.sleep(_BETWEEN_LOOKS_S)
    return min(looks, key=Counter.total)


def descriptors(pid: int) -> Counter[str]:
    """Of a process, by what they are: `pipe`, `anon_inode:[eventpoll]`, `socket 127.0.0.1:80 LISTEN`."""
    try:
        sockets = {each.fd: _socket(each) for each in psutil.Process(pid).net_connections("all")}
    except psutil.Error:
        sockets = {}  # it has just gone: then there are no descriptors either
    found: Counter[str] = Counter()
    folder = f"/proc/{pid}/fd"
    with contextlib.suppress(FileNotFoundError):
        for number in os.listdir(folder):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                what = _NUMBER.sub("", os.readlink(f"{folder}/{number}"))
                found[sockets.get(int(number), what) if what == "socket" else what] += 1
    return found


def _socket(socket: Any) -> str:
    """What psutil tells of one, for a person."""
    if not socket.laddr or isinstance(socket.laddr, str):
        return f"socket unix {socket.laddr}".rstrip()
    ends = " to ".join(f"{end.ip}:{end.port}" for end in (socket.laddr, socket.raddr) if end)
    return f"socket {ends} {socket.status}"

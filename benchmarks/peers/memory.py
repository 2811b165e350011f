"""What a process and its children hold and have read, as Linux tells it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from amoe.errors import AmoeError

_PROC = Path("/proc")


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Sums over processes, in bytes.

    Attributes:
        rss: resident; what several map is counted for each.
        pss: resident; what several map is divided among them.
        read_calls: bytes that read calls have returned.
        read_storage: bytes that had to come from storage, mapped files included.
    """

    rss: int
    pss: int
    read_calls: int
    read_storage: int


def tree(pid: int) -> list[int]:
    """The process, its children, their children."""
    found, pending = [], [pid]
    while pending:
        found.append(parent := pending.pop())
        for children in _PROC.glob(f"{parent}/task/*/children"):
            try:
                pending.extend(int(child) for child in children.read_text().split())
            except OSError:
                continue  # the thread has ended
    return found


def usage(pid: int) -> Usage:
    """Of the process and all below it.

    Raises:
        AmoeError: this is not Linux, or the process is gone.
    """
    totals = dict.fromkeys(("Rss", "Pss", "rchar", "read_bytes"), 0)
    seen = 0
    for member in tree(pid):
        try:
            text = (_PROC / str(member) / "smaps_rollup").read_text() + (_PROC / str(member) / "io").read_text()
        except OSError:
            continue
        seen += 1
        for line in text.splitlines():
            name, _, value = line.partition(":")
            if name in totals:
                totals[name] += int(value.split()[0]) * (1024 if value.endswith("kB") else 1)
    if not seen:
        raise AmoeError(f"nothing is known of the memory of process {pid}")
    return Usage(rss=totals["Rss"], pss=totals["Pss"], read_calls=totals["rchar"], read_storage=totals["read_bytes"])


def forget_pages(paths: Iterable[Path]) -> int:
    """Let files leave the page cache. Returns their bytes."""
    total = 0
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        total += path.stat().st_size
    return total

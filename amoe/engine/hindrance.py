"""What keeps this process from running: other processes that use the processors, and disks."""

from __future__ import annotations

import resource
import threading
from pathlib import Path
from typing import NamedTuple

_TASKS = Path("/proc/self/task")
_NS = 1e-9


class _Thread(NamedTuple):
    """Seconds that it has run, and that it has waited for a processor; `R` running or about to, `D` at a disk, ..."""

    ran_s: float
    waited_s: float
    state: str


class Hindrance:
    """Tells for how long the threads of this process were kept from running; not the one that asks.

    The kernel counts the time that a thread has waited for a processor when it gets one. One that still waits shows by
    having been ready to run twice in a row, without having run in between. Threads that wait for each other are kept by
    what keeps one of them, so all count; and what cannot be read counts as having been kept.
    """

    def __init__(self, tasks: Path = _TASKS) -> None:
        self._tasks = tasks
        self._threads: dict[str, _Thread] | None = None
        self._num_faults = 0

    def mark(self) -> None:
        """The time that `kept_s` tells of next begins now."""
        self._threads, self._num_faults = self._read(), _num_faults()

    def kept_s(self, seconds: float) -> float:
        """Of the `seconds` since the last mark, for how many something kept a thread from running. Marks again."""
        before, num_faults = self._threads, self._num_faults
        self.mark()
        after = self._threads
        if before is None or after is None or self._num_faults != num_faults:
            return seconds
        if any(thread.state == "D" for thread in after.values()):
            return seconds
        kept_s = sum(_kept_s(before[tid], thread, seconds) for tid, thread in after.items() if tid in before)
        return min(seconds, kept_s)

    def _read(self) -> dict[str, _Thread] | None:
        """By thread id; None: it cannot be read."""
        me = str(threading.get_native_id())
        threads = {}
        try:
            for task in self._tasks.iterdir():
                if task.name != me:
                    threads[task.name] = _read_thread(task)
        except (OSError, ValueError, IndexError):  # a thread has ended meanwhile, or the kernel does not tell
            return None
        return threads


def _read_thread(task: Path) -> _Thread:
    ran, waited = (task / "schedstat").read_text().split()[:2]
    state = (task / "stat").read_text().rpartition(")")[2].split()[0]
    return _Thread(int(ran) * _NS, int(waited) * _NS, state)


def _kept_s(before: _Thread, after: _Thread, seconds: float) -> float:
    if before.state == after.state == "R":
        return max(0.0, seconds - (after.ran_s - before.ran_s))
    return after.waited_s - before.waited_s


def _num_faults() -> int:
    """Pages that this process has had to wait for, because they lay on a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt

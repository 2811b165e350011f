"""What keeps a process from running, from what the kernel says of its threads."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from amoe.engine import hindrance
from amoe.engine.hindrance import Hindrance


class Kernel:
    """A directory like /proc/self/task."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def say(self, thread: int, ran_s: float, waited_s: float, state: str = "S") -> None:
        task = self.directory / str(thread)
        task.mkdir(exist_ok=True)
        (task / "schedstat").write_text(f"{ran_s * 1e9:.0f} {waited_s * 1e9:.0f} 17\n")
        (task / "stat").write_text(f"{thread} (a (strange) name) {state} 1 2 3\n")


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path)


def test_nothing_keeps_who_runs_or_waits_for_what_never_comes(kernel: Kernel):
    kernel.say(1, 5.0, 0.2, "R")
    kernel.say(2, 1.0, 0.1, "S")
    asked = Hindrance(kernel.directory)
    asked.mark()
    kernel.say(1, 6.0, 0.2, "R")
    assert asked.kept_s(1.0) == pytest.approx(0.0)


def test_waits_for_a_processor_count_of_all_threads(kernel: Kernel):
    kernel.say(1, 5.0, 0.2)
    kernel.say(2, 1.0, 0.1)
    asked = Hindrance(kernel.directory)
    asked.mark()
    kernel.say(1, 5.5, 0.4)
    kernel.say(2, 1.0, 0.5)
    kernel.say(3, 0.0, 9.0)  # new: it is not known since when it waits
    assert asked.kept_s(1.0) == pytest.approx(0.6)
    kernel.say(1, 5.5, 1.4)
    kernel.say(2, 1.0, 1.5)
    assert asked.kept_s(1.0) == pytest.approx(1.0), "not more than there was"


def test_who_has_not_got_one_yet_waits_too(kernel: Kernel):
    """The kernel counts only once it has."""
    kernel.say(1, 5.0, 0.2, "R")
    asked = Hindrance(kernel.directory)
    asked.mark()
    kernel.say(1, 5.1, 0.2, "R")
    assert asked.kept_s(1.0) == pytest.approx(0.9)


def test_disks_keep(kernel: Kernel, monkeypatch: pytest.MonkeyPatch):
    kernel.say(1, 5.0, 0.2)
    asked = Hindrance(kernel.directory)
    asked.mark()
    kernel.say(1, 5.0, 0.2, "D")
    assert asked.kept_s(1.0) == 1.0
    kernel.say(1, 5.0, 0.2)
    assert asked.kept_s(1.0) == 0.0
    before = hindrance._num_faults()
    monkeypatch.setattr(hindrance, "_num_faults", lambda: before + 1)
    assert asked.kept_s(1.0) == 1.0


def test_what_cannot_be_read_counts_as_kept(kernel: Kernel):
    asked = Hindrance(kernel.directory / "nothing")
    asked.mark()
    assert asked.kept_s(1.0) == 1.0
    asked = Hindrance(kernel.directory)
    assert asked.kept_s(1.0) == 1.0, "nobody has marked"
    kernel.say(1, 5.0, 0.2)
    (kernel.directory / "1" / "stat").write_text("")
    asked.mark()
    assert asked.kept_s(1.0) == 1.0


def test_the_thread_that_asks_does_not_count(kernel: Kernel):
    me = threading.get_native_id()
    kernel.say(me, 5.0, 0.2, "R")
    asked = Hindrance(kernel.directory)
    asked.mark()
    kernel.say(me, 5.0, 0.9, "R")
    assert asked.kept_s(1.0) == 0.0


def test_this_process_can_be_read():
    """On the kernels that it runs on: a thread that waits for an event is not kept."""
    event = threading.Event()
    thread = threading.Thread(target=event.wait)
    thread.start()
    try:
        readings = (Hindrance()._read() for _ in range(100))  # None if some other thread ends just then
        threads = next(reading for reading in readings if reading is not None)
        assert str(thread.native_id) in threads
        assert str(threading.get_native_id()) not in threads
    finally:
        event.set()
        thread.join()

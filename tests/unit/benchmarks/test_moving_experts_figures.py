"""What `benchmarks.moving_experts` makes of times and answers."""

from __future__ import annotations

import os

import pytest

from benchmarks.moving_experts import Change, anonymous_mib, gaps_of, make_bodies


def test_gaps_are_those_that_end_in_the_time() -> None:
    times = [[0.0, 1.0, 1.0, 3.0, 7.0], [2.5, 2.6], [5.0]]
    assert gaps_of(times, 0.5, 3.0) == pytest.approx((1000.0, 1980.0, 2000.0))
    assert gaps_of(times, 3.5, 6.0) == (0.0, 0.0, 0.0)


def test_a_row_says_what_moved_and_what_it_took() -> None:
    what = Change(workers=2, asked=10.0, serving=13.0, done=14.5, settled=15.0, memory_before=2500, memory_peak=2501)
    what.memory_after, what.gaps_ms = 1300, (30.0, 60.0, 90.0)
    assert what.row() == "| 1 to 2 | 3.0 | 1.5 | 2.0 | 0 / 0 / 0 | 30 / 60 / 90 | 2,500 | 2,501 | 1,300 |"
    what = Change(workers=1, asked=10.0, done=12.0, settled=12.0)
    assert what.row().startswith("| 2 to 1 |  | 2.0 | 2.0 |")


def test_the_same_requests_every_time() -> None:
    bodies = make_bodies(3, 20, 1000)
    assert bodies == make_bodies(3, 20, 1000)
    assert len({tuple(body["prompt"]) for body in bodies}) == 3
    assert all(3 <= token < 1000 for body in bodies for token in body["prompt"])


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux")
def test_memory_that_is_written_is_seen() -> None:
    before = anonymous_mib(os.getpid())
    block = bytearray(64 << 20)
    block[:: 1 << 12] = bytes(len(block[:: 1 << 12]))
    assert anonymous_mib(os.getpid()) - before > 32

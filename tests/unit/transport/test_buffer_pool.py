"""Buffers come back, in sizes that are large enough, and only so many are kept."""

from __future__ import annotations

import pytest

from amoe.transport import buffer_pool
from amoe.transport.buffer_pool import BufferPool


def test_buffer_comes_back() -> None:
    pool = BufferPool(1024)
    first = pool.take(1)
    assert first.nbytes == 1024
    assert pool.take(1) is not first
    pool.give(first)
    assert pool.take(1000) is first


@pytest.mark.parametrize("nbytes", [0, 1, 1024, 1025, 5000, 1 << 20])
def test_buffer_is_large_enough(nbytes: int) -> None:
    pool = BufferPool(1024)
    buffer = pool.take(nbytes)
    assert nbytes <= buffer.nbytes <= max(1024, 2 * nbytes)
    pool.give(buffer)
    assert pool.take(nbytes) is buffer


def test_small_one_is_not_taken_for_a_large_one() -> None:
    pool = BufferPool(64)
    small = pool.take(64)
    pool.give(small)
    assert pool.take(65) is not small


def test_no_more_is_kept_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffer_pool, "_MOST_KEPT_BYTES", 3 * 1024)
    pool = BufferPool(1024)
    buffers = [pool.take(1) for _ in range(4)]
    for buffer in buffers:
        pool.give(buffer)
    taken = [pool.take(1) for _ in range(4)]
    assert sum(buffer in buffers for buffer in taken) == 3

"""The ring against a model: a queue of records that may be overwritten once released, and not before."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoe.errors import TransportError
from amoe.transport.ring import CONTROL_BYTES, JUMP, NEVER, WARM_BYTES, RingReader, RingWriter, reset

START = 256


class Harness:
    """A writer and a reader over private memory; each record is filled with a byte of its own."""

    def __init__(self, capacity: int, warm_bytes: int = WARM_BYTES) -> None:
        self.memory = bytearray(START + capacity + 64)
        self.memory[START + capacity :] = b"\xee" * 64
        self.words = memoryview(self.memory).cast("Q")
        reset(self.words, 0)
        self.writer = RingWriter(self.words, 0, START, capacity, warm_bytes)
        self.reader = RingReader(self.words, 0, START, capacity)
        self.published: deque[tuple[int, int]] = deque()  # size, filling
        self.taken: list[tuple[int, int, int]] = []  # offset, size, filling
        self.count = 0

    def write(self, lines: int) -> bool:
        size = 64 * lines
        offset = self.writer.reserve(size)
        if offset is None:
            return False
        assert offset % 64 == 0
        self.count += 1
        filling = self.count % 251
        self.memory[offset : offset + size] = bytes([filling]) * size
        self.words[offset // 8] = size
        self.writer.publish(size)
        self.published.append((size, filling))
        self.check_taken()
        return True

    def take(self) -> bool:
        if self.reader.is_empty:
            assert not self.published
            return False
        offset, size = self.reader.take()
        expected, filling = self.published.popleft()
        assert size == expected
        self.taken.append((offset, size, filling))
        self.check_taken()
        return True

    def release(self) -> None:
        self.reader.release()
        self.taken.clear()

    def check_taken(self) -> None:
        assert self.memory[-64:] == b"\xee" * 64
        for offset, size, filling in self.taken:
            assert self.memory[offset + 8 : offset + size] == bytes([filling]) * (size - 8)


@given(
    lines=st.integers(1, 12),
    warm_lines=st.integers(1, 12),
    actions=st.lists(st.one_of(st.integers(1, 12), st.sampled_from(["take", "release"])), max_size=120),
)
def test_against_a_model(lines: int, warm_lines: int, actions: list[int | str]) -> None:
    ring = Harness(64 * lines, 64 * warm_lines)
    for action in actions:
        if action == "take":
            ring.take()
        elif action == "release":
            ring.release()
        elif int(action) <= lines:
            ring.write(int(action))
        else:
            with pytest.raises(TransportError, match="does not fit"):
                ring.writer.reserve(64 * int(action))
    while ring.take():
        pass
    ring.release()
    # Whatever has happened: an empty ring takes a record as large as itself.
    assert ring.write(lines)
    assert ring.take()


def test_full_ring_refuses_until_released() -> None:
    ring = Harness(4 * 64)
    assert all(ring.write(1) for _ in range(4))
    assert not ring.write(1)
    ring.take()
    assert not ring.write(1)
    ring.release()
    assert ring.write(1)
    assert not ring.write(1)


def test_empty_ring_returns_to_its_front() -> None:
    ring = Harness(8 * 64)
    for _ in range(20):
        ring.write(2)
        ring.take()
        assert ring.taken[0][0] == START
        ring.release()
        # The whole ring is free again, although the reader has not been told of the jump.
    assert all(ring.write(2) for _ in range(4))


def test_busy_ring_stays_near_its_front() -> None:
    """One record is always being read, so that the ring is never empty."""
    ring = Harness(4 << 20)
    offsets = set()
    ring.write(16)
    for _ in range(3000):
        assert ring.write(16)
        ring.take()
        offsets.add(ring.taken[-1][0])
        ring.release()
    assert max(offsets) < 300 << 10


def test_reset_forgets_all() -> None:
    ring = Harness(4 * 64)
    ring.write(3)
    reset(ring.words, 0)
    assert ring.words[JUMP] == NEVER
    assert RingReader(ring.words, 0, START, 4 * 64).is_empty


@pytest.mark.parametrize("size", [0, 63, 64 * 5, 2**63])
def test_impossible_size_is_an_error(size: int) -> None:
    ring = Harness(4 * 64)
    ring.write(2)
    ring.words[START // 8] = size
    with pytest.raises(TransportError, match="impossible size"):
        ring.reader.take()


def test_control_words_fit() -> None:
    assert CONTROL_BYTES <= START

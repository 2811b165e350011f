"""A byte ring in shared memory between one writer and one reader, with records of variable size.

Positions are byte counters that only grow; a position modulo the capacity is a place in the ring. Each record begins
with its own size (u64, a multiple of 64) and lies in one piece, so that it can be read in place. The writer leaves the
rest of a lap unused where the next record would not fit in one piece (it *jumps* to the next lap, and says so in
`jump`). It also jumps when the reader has taken everything, or has freed enough of the front: a ring that is mostly
empty stays at its front, warm in the cache, and its further pages are never touched and so never allocated. Because an
empty ring starts at its front, a record may be as large as the ring. One jump at most is ahead of the reader: after a
jump there is no space for another before the reader has entered the new lap.

Shared words (u64), in three cache lines, so that the two sides do not share one for nothing:

    HEAD  written by the writer   end of the last published record
    JUMP  written by the writer   where the last jump left its lap
    TAIL  written by the reader   all before it may be overwritten
    WAIT  set by the writer, cleared by the reader: the writer waits for space

Memory order. A record is published by storing HEAD after the record and JUMP; space is given back by storing TAIL after
the last use of the record. Both are aligned 8-byte stores of a cast memoryview, which CPython does by one machine store
in a function that the compiler cannot move other accesses across. x86-64 keeps stores in order and loads in order
(TSO), so whoever sees the new HEAD sees the record, and whoever sees the new TAIL overwrites nothing that is still
being read. Nothing here relies on the one reordering that x86 permits, a load before an earlier store to elsewhere:
sleeping and waiting for space go through a doorbell (see `amoe.transport.shm`), a system call that orders both.
On ARM the store would have to be a release (`stlr`) and the load of the other side an acquire (`ldar`), which Python
cannot express: a native helper, or a look at the rings only after a doorbell, would be needed.
"""

from __future__ import annotations

from amoe.errors import TransportError

CONTROL_BYTES = 192  # three cache lines
HEAD, JUMP, TAIL, WAIT = 0, 1, 8, 16  # indexes of words
NEVER = 2**64 - 1
_LINE = 64
WARM_BYTES = 256 << 10  # with so much free at the front, and twice the record, the writer returns there


def reset(words: memoryview, control: int) -> None:
    """Make the ring whose control words begin at index `control` of `words` (u64) empty."""
    words[control + HEAD] = words[control + TAIL] = words[control + WAIT] = 0
    words[control + JUMP] = NEVER


class RingWriter:
    """The sending side.

    Args:
        words: the shared memory as u64.
        control: index of the first control word.
        start: byte offset of the ring's space in the shared memory.
        capacity: bytes of that space, a multiple of 64.
        warm_bytes: see `WARM_BYTES`.
    """

    __slots__ = (
        "_floor",
        "_head",
        "_head_word",
        "_jumped",
        "_pending",
        "_start",
        "_tail_word",
        "_warm_bytes",
        "_words",
        "capacity",
        "wait_word",
    )

    def __init__(
        self, words: memoryview, control: int, start: int, capacity: int, warm_bytes: int = WARM_BYTES
    ) -> None:
        self._warm_bytes = warm_bytes
        self._words = words
        self._head_word = control + HEAD
        self._tail_word = control + TAIL
        self.wait_word = control + WAIT
        self._start = start
        self.capacity = capacity
        self._head: int = words[control + HEAD]
        if words[control + JUMP] == self._head:  # the writer before this one died between the jump and the record
            words[control + JUMP] = NEVER
        self._floor = 0  # nothing before it is unread, although TAIL may not say so yet
        self._pending = 0  # position of the reserved record
        self._jumped = False

    def reserve(self, size: int) -> int | None:
        """Byte offset at which a record of `size` bytes (a multiple of 64) may be written; None: no space now.

        Raises:
            TransportError: the record is larger than the ring.
        """
        capacity, head = self.capacity, self._head
        if size > capacity:
            raise TransportError(f"a record of {size} bytes does not fit a ring of {capacity}: raise ring_bytes")
        tail: int = self._words[self._tail_word]
        place = head % capacity
        self._jumped = False
        if tail == head:
            if place:
                self._floor = head = head - place + capacity
                self._jumped = True
        else:
            if tail < self._floor:
                tail = self._floor
            freed = tail - (head - place)  # bytes free at the front of this lap; negative: the reader is a lap behind
            if place + size > capacity or freed >= max(self._warm_bytes, 2 * size):
                head += capacity - place
                self._jumped = True
            if head + size - tail > capacity:
                return None
        self._pending = head
        return self._start + head % capacity

    def publish(self, size: int) -> None:
        """Let the reader see the record of `size` bytes that was reserved last."""
        words = self._words
        if self._jumped:
            words[self._head_word + JUMP] = self._head
        self._head = self._pending + size
        words[self._head_word] = self._head


class RingReader:
    """The receiving side. See `RingWriter` for the arguments.

    Attributes:
        position: all before it has been taken.
        head_word, wait_word: where HEAD and WAIT lie in `words`, for whoever scans many rings.
    """

    __slots__ = ("_start", "_tail_word", "_words", "capacity", "head_word", "position", "wait_word")

    def __init__(self, words: memoryview, control: int, start: int, capacity: int) -> None:
        self._words = words
        self.head_word = control + HEAD
        self._tail_word = control + TAIL
        self.wait_word = control + WAIT
        self._start = start
        self.capacity = capacity
        self.position: int = words[control + TAIL]

    @property
    def is_empty(self) -> bool:
        """There is nothing to take: HEAD equals `position`, which who scans many rings compares for itself."""
        return self._words[self.head_word] == self.position

    def take(self) -> tuple[int, int]:
        """Byte offset and size of the next record, which there must be. It stays readable until `release`.

        Raises:
            TransportError: what lies there cannot be a record.
        """
        words, position = self._words, self.position
        head: int = words[self.head_word]
        capacity = self.capacity
        if position == words[self.head_word + JUMP]:
            position += capacity - position % capacity
        place = position % capacity
        offset = self._start + place
        size: int = words[offset >> 3]
        if size == 0 or size % _LINE or size > head - position or place + size > capacity:
            raise TransportError(f"the ring holds a record of impossible size {size}")
        self.position = position + size
        return offset, size

    def release(self) -> None:
        """Give the space of all taken records back."""
        self._words[self._tail_word] = self.position

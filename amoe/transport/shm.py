"""Transport between processes of one host: a ring per directed pair of ranks in shared memory, a doorbell per rank.

The memory is one memfd: it has no name, so nothing can be left in /dev/shm, whoever is killed when, and its pages are
allocated when first written. The doorbells are eventfds. Parent and children share both by inheritance.

    memfd:  | HINT word of each rank | control words of each ring | space of each ring |
            ring of (src, dst) has index dst · num_ranks + src

No wake-up is lost, because every send rings the destination's doorbell after it has published the record, and `poll`
drains the doorbell before it looks at the rings: what was published before a drained ring is seen (the system calls
order the accesses), and what comes later leaves the doorbell rung, so that the descriptor is readable again.

HINT spares `poll` the drain, a system call, while nobody has rung: a sender sets HINT and then rings, `poll` clears
HINT and then drains. The hint comes first because the ring may put the sender to sleep in favour of the reader. A
`poll` between the two drains too early and leaves the descriptor readable without a hint; therefore every fourth idle
`poll` drains anyway.

Waiting for space: a sender whose record does not fit sets WAIT of that ring and rings the reader. The reader, whenever
it has drained its doorbell, first gives back the space of the batches that it delivered last time, then rings every
sender that waits. The sender tries again (in `poll`, so that no caller can drain the answer and forget to), and if
there is still no space, asks again: each turn gives back what the turn before has delivered, so this ends. Nobody
blocks meanwhile.

A worker that is started anew attaches to the rings of the one that died. What is published there is whole, because HEAD
moves last; what the dead one had read and not given back is read again, which receivers bear (`Batch.src_incarnation`).
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections import deque
from collections.abc import Mapping

import msgspec

from amoe.errors import ConfigError, TransportError
from amoe.transport.base import Peer
from amoe.transport.loopback import Loopback
from amoe.transport.ring import CONTROL_BYTES, RingReader, RingWriter, reset
from amoe.transport.wire import ALIGNMENT, Layout, WireBuffer, decode, encode_into, layout_of
from amoe.types import Batch

_PAGE = 4096
_IDLE_POLLS = 4  # without a batch, before the doorbell is drained without a hint


class ShmSpec(msgspec.Struct, frozen=True, kw_only=True, tag="shm"):
    """All that a process needs to attach, besides its rank: it has inherited the descriptors.

    Attributes:
        num_ranks: workers.
        ring_bytes: capacity of each ring, a multiple of the page size.
        memory_fd: the memfd.
        doorbell_fds: [num_ranks] eventfds.
    """

    num_ranks: int
    ring_bytes: int
    memory_fd: int
    doorbell_fds: tuple[int, ...]

    @property
    def control_start(self) -> int:
        """Byte offset of the control words."""
        return self.num_ranks * ALIGNMENT

    @property
    def space_start(self) -> int:
        """Byte offset of the first ring's space."""
        return _page_aligned(self.control_start + self.num_ranks**2 * CONTROL_BYTES)

    @property
    def total_bytes(self) -> int:
        return self.space_start + self.num_ranks**2 * self.ring_bytes

    def ring(self, src: int, dst: int) -> tuple[int, int, int]:
        """Index of the first control word, byte offset and capacity of the ring from `src` to `dst`."""
        index = dst * self.num_ranks + src
        return (
            (self.control_start + index * CONTROL_BYTES) // 8,
            self.space_start + index * self.ring_bytes,
            self.ring_bytes,
        )


def _owned(made: contextlib.ExitStack, descriptor: int) -> int:
    """`descriptor`, which `made` closes."""
    made.callback(os.close, descriptor)
    return descriptor


def _reset_rings(spec: ShmSpec) -> None:
    with mmap.mmap(spec.memory_fd, spec.space_start) as region, memoryview(region).cast("Q") as words:
        for src in range(spec.num_ranks):
            for dst in range(spec.num_ranks):
                reset(words, spec.ring(src, dst)[0])


def _page_aligned(num_bytes: int) -> int:
    return -(-num_bytes // _PAGE) * _PAGE


class ShmFabric:
    """The shared memory and the doorbells of one group of workers, held by their parent."""

    def __init__(self, spec: ShmSpec) -> None:
        self.spec = spec
        self._closed = False

    @classmethod
    def create(cls, num_ranks: int, ring_bytes: int) -> ShmFabric:
        """Rings of at least `ring_bytes` (rounded up to pages) between `num_ranks` workers.

        Raises:
            ConfigError: this host has no room for so many.
        """
        with contextlib.ExitStack() as made:
            try:
                memory_fd = _owned(made, os.memfd_create("amoe-rings", os.MFD_CLOEXEC))
                doorbells = tuple(
                    _owned(made, os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)) for _ in range(num_ranks)
                )
                spec = ShmSpec(
                    num_ranks=num_ranks,
                    ring_bytes=_page_aligned(ring_bytes),
                    memory_fd=memory_fd,
                    doorbell_fds=doorbells,
                )
                os.ftruncate(memory_fd, spec.total_bytes)
                _reset_rings(spec)
            except (OSError, OverflowError) as error:
                raise ConfigError(
                    f"no shared memory for {num_ranks} workers ({error}): ask for fewer workers (--max-expert-workers "
                    "counts), or raise the limit of open files (`ulimit -n`)"
                ) from error
            made.pop_all()
        return cls(spec)

    def spec_for(self, host: str = "", device: str = "cpu") -> ShmSpec:
        """The same for all, which are processes of this host."""
        return self.spec

    def fds(self) -> tuple[int, ...]:
        """Descriptors that a child must inherit under the same numbers (`pass_fds`)."""
        return (self.spec.memory_fd, *self.spec.doorbell_fds)

    def endpoint(self, rank: int) -> ShmTransport:
        """Worker `rank`'s end, in this very process."""
        return ShmTransport.attach(self.spec, rank)

    def close(self) -> None:
        """Close the parent's descriptors. The memory lives on while a child has it mapped."""
        if not self._closed:
            self._closed = True
            for descriptor in self.fds():
                os.close(descriptor)


class ShmTransport:
    """One worker's end. See `amoe.transport.base.Transport`; the descriptors stay the caller's.

    Raises:
        TransportError: from `send`, if a batch is larger than a ring.
    """

    def __init__(self, spec: ShmSpec, rank: int) -> None:
        self._rank = rank
        self._region = mmap.mmap(spec.memory_fd, spec.total_bytes)
        self._buffer = WireBuffer(self._region)
        self._words = self._buffer.octets.cast("Q")
        self._doorbells = spec.doorbell_fds
        peers = [peer for peer in range(spec.num_ranks) if peer != rank]
        self._writers = {dst: RingWriter(self._words, *spec.ring(rank, dst)) for dst in peers}
        self._readers = [(src, RingReader(self._words, *spec.ring(src, rank))) for src in peers]
        self._delivered: list[RingReader] = []  # their last batches are being used
        self._backlog: dict[int, deque[WireBuffer]] = {}  # by destination; no key: nothing waits
        self._loopback = Loopback()
        self._idle = 0
        self._peers: dict[int, Peer] = dict.fromkeys(peers, Peer(0))
        self._closed = False

    @classmethod
    def attach(cls, spec: ShmSpec, rank: int) -> ShmTransport:
        """The end of worker `rank`. Only one may be in use at a time."""
        return cls(spec, rank)

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def address(self) -> str:
        return ""

    def update(self, peers: Mapping[int, Peer]) -> None:
        for dst in [dst for dst in self._backlog if peers.get(dst) != self._peers.get(dst)]:
            del self._backlog[dst]
        self._peers = dict(peers)

    def send(self, batch: Batch) -> None:
        dst = batch.dst
        if dst == self._rank:
            self._loopback.put(batch)
            self._ring(dst)
            return
        writer = self._writers.get(dst)
        if writer is None:
            raise TransportError(f"there is no worker of rank {dst}")
        if dst not in self._peers:
            return
        layout = layout_of(batch)
        size = layout.size
        # Order first: what comes after something that waits has to wait as well.
        offset = writer.reserve(size) if dst not in self._backlog else None
        if offset is None:
            self._keep(batch, layout, writer)
            return
        encode_into(batch, self._buffer, offset, layout)
        writer.publish(size)
        self._ring(dst)

    def poll(self) -> list[Batch]:
        words = self._words
        hint = self._rank * 8
        rung = bool(words[hint]) or self._idle >= _IDLE_POLLS
        if rung:
            words[hint] = 0
            self._idle = 0
            try:  # noqa: SIM105  (suppress() would cost as much as all the rest)
                os.eventfd_read(self._doorbells[self._rank])
            except BlockingIOError:
                pass
        if self._delivered:
            for reader in self._delivered:
                reader.release()
            self._delivered.clear()
        if rung:
            self._answer_waiting()
            if self._backlog:
                self.flush()  # the ring just drained may have been the answer to this side's own request for space
        batches = self._loopback.take() if self._loopback else []
        for src, reader in self._readers:
            if words[reader.head_word] != reader.position:
                self._collect(src, reader, batches)
        if not batches:
            self._idle += 1
        return batches

    def flush(self) -> bool:
        if not self._backlog:
            return True
        for dst in list(self._backlog):
            self._flush_to(dst, self._writers[dst], self._backlog[dst])
        return not self._backlog

    def fileno(self) -> int:
        return self._doorbells[self._rank]

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._writers.clear()
        self._readers.clear()
        self._delivered.clear()
        self._words.release()
        self._buffer.octets.release()
        del self._buffer
        # Whoever still holds a batch holds views of the mapping; it goes when the last of them goes.
        with contextlib.suppress(BufferError):
            self._region.close()

    def _ring(self, rank: int) -> None:
        self._words[rank * 8] = 1
        os.eventfd_write(self._doorbells[rank], 1)

    def _answer_waiting(self) -> None:
        for src, reader in self._readers:
            if self._words[reader.wait_word]:
                self._words[reader.wait_word] = 0
                self._ring(src)

    def _collect(self, src: int, reader: RingReader, batches: list[Batch]) -> None:
        """Decode all that `src` has published."""
        self._delivered.append(reader)
        words, head_word = self._words, reader.head_word
        while words[head_word] != reader.position:
            offset, size = reader.take()
            batch = decode(self._buffer, offset, size)
            if batch.src != src or batch.dst != self._rank:
                raise TransportError(f"worker {src} sent {self._rank} a batch from {batch.src} to {batch.dst}")
            batches.append(batch)

    def _keep(self, batch: Batch, layout: Layout, writer: RingWriter) -> None:
        """Copy a batch that cannot go out now behind those that wait already."""
        if layout.size > writer.capacity:
            writer.reserve(layout.size)  # raises
        kept = WireBuffer.allocate(layout.size)
        encode_into(batch, kept, 0, layout)
        self._backlog.setdefault(batch.dst, deque()).append(kept)
        self._ask_for_space(batch.dst, writer)

    def _flush_to(self, dst: int, writer: RingWriter, waiting: deque[WireBuffer]) -> None:
        sent = False
        while waiting:
            size = waiting[0].nbytes
            offset = writer.reserve(size)
            if offset is None:
                break
            self._buffer.octets[offset : offset + size] = waiting.popleft().octets
            writer.publish(size)
            sent = True
        if waiting:
            self._ask_for_space(dst, writer)
        else:
            del self._backlog[dst]
        if sent:
            self._ring(dst)

    def _ask_for_space(self, dst: int, writer: RingWriter) -> None:
        if not self._words[writer.wait_word]:
            self._words[writer.wait_word] = 1
            self._ring(dst)

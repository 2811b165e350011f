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

from amoe.errors import TransportError
from amoe.transport.base import Peer
from amoe.transport.loopback import Loopback
from amoe.transport.ring import RingReader, RingWriter
from amoe.transport.shm_fabric import ShmSpec
from amoe.transport.wire import Layout, WireBuffer, decode, encode_into, layout_of
from amoe.types import Batch

_IDLE_POLLS = 4  # without a batch, before the doorbell is drained without a hint


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

"""A transport between workers of one process, stepped by one thread or by several: for deterministic tests.

What crosses between two ranks is encoded into fresh memory and decoded from there, so that tests see what a real
transport does: batches are copies, their order per pair is kept, and a batch is valid until the next `poll` only. To
catch whoever keeps one longer, the memory of expired batches is overwritten (0xFF: NaN as a payload, -1 as a slot).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping

from amoe.errors import TransportError
from amoe.transport.base import Peer
from amoe.transport.loopback import Loopback
from amoe.transport.wire import WireBuffer, decode, encode_into, encoded_size
from amoe.types import Batch


class InprocFabric:
    """The mailboxes of `num_ranks` workers.

    Args:
        num_ranks: workers; each rank has one endpoint.
        poison: overwrite expired batches, to expose whoever still reads them.
    """

    def __init__(self, num_ranks: int, *, poison: bool = True) -> None:
        self._mailboxes: list[deque[WireBuffer]] = [deque() for _ in range(num_ranks)]
        self._endpoints = [InprocTransport(rank, self._mailboxes, poison) for rank in range(num_ranks)]
        for endpoint in self._endpoints:
            endpoint.connect(self._endpoints)

    def endpoint(self, rank: int) -> InprocTransport:
        """The transport of worker `rank`, always the same object."""
        return self._endpoints[rank]

    def close(self) -> None:
        """Close all endpoints."""
        for endpoint in self._endpoints:
            endpoint.close()


class InprocTransport:
    """One worker's end. See `amoe.transport.base.Transport`."""

    def __init__(self, rank: int, mailboxes: list[deque[WireBuffer]], poison: bool) -> None:
        self._rank = rank
        self._mailboxes = mailboxes
        self._poison = poison
        self._peers: list[InprocTransport] = []
        self._loopback = Loopback()
        self._delivered: list[WireBuffer] = []
        self._doorbell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closed = False

    def connect(self, peers: list[InprocTransport]) -> None:
        """Make the other endpoints known (called once by the fabric)."""
        self._peers = peers

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def address(self) -> str:
        return ""

    def update(self, peers: Mapping[int, Peer]) -> None:
        """All endpoints are there from the beginning to the end."""

    def send(self, batch: Batch) -> None:
        if batch.dst == self._rank:
            self._loopback.put(batch)
            self._ring()
            return
        if not 0 <= batch.dst < len(self._peers):
            raise TransportError(f"there is no worker of rank {batch.dst}")
        peer = self._peers[batch.dst]
        if peer._closed:
            raise TransportError(f"worker {batch.dst} is gone")
        buffer = WireBuffer.allocate(encoded_size(batch))
        encode_into(batch, buffer)
        self._mailboxes[batch.dst].append(buffer)  # deque: safe between threads
        peer._ring()

    def poll(self) -> list[Batch]:
        # First the doorbell, then the mailbox: what comes in between rings again.
        try:
            os.eventfd_read(self._doorbell)
        except BlockingIOError:
            return self._collect() if self._loopback or self._mailboxes[self._rank] else self._expire()
        return self._collect()

    def flush(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._doorbell

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._expire()
            os.close(self._doorbell)

    def _ring(self) -> None:
        os.eventfd_write(self._doorbell, 1)

    def _expire(self) -> list[Batch]:
        if self._poison:
            for buffer in self._delivered:
                buffer.octets[:] = b"\xff" * buffer.nbytes
        self._delivered.clear()
        return []

    def _collect(self) -> list[Batch]:
        self._expire()
        batches = self._loopback.take()
        mailbox = self._mailboxes[self._rank]
        for _ in range(len(mailbox)):
            buffer = mailbox.popleft()
            self._delivered.append(buffer)
            batches.append(decode(buffer))
        return batches

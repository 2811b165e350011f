"""Transport over torch.distributed, point to point: gloo between CPUs; between GPUs NCCL for what is large.

Each pair of workers has process groups of its own, of these two lives alone. So the death of a worker breaks its own
links and no other, and the one that follows it gets new ones. They are set up beside the caller, through a
`Rendezvous`, see `distributed_pairing`.

A batch is a message of fixed size, the first `eager_bytes` of its record (`amoe.transport.wire`), whose header tells
whether and how much follows in a second one. Nobody has to tell sizes first. Where payloads are on GPUs, only header
and columns travel so, and the payload goes from device to device (`distributed_payloads`).

Threads. The scheduler's thread posts sends itself, which does not block, and takes what has arrived. Each link has a
thread that always has receives posted, and one that waits for sends to be done and gives their buffers back.

No deadlock. A send is done when its peer receives it. The receiving thread of the peer waits for nothing but the next
message: not for its scheduler, since what has arrived waits in a queue without limit, and not for its own sends. So
every send of a living peer is received in the end, whatever goes the other way meanwhile; payloads likewise, because
one is sent right behind its record, and each direction has its own group. Locks are held while something is posted,
never while something is waited for. The queues are bounded by the token slots, see `amoe.transport.tcp`.

A cut link. gloo gives up when TCP does, after minutes; what has been cut for less goes on by itself, without loss. A
peer that dies in the milliseconds in which its link is being set up costs this process some descriptors, which gloo
keeps, or a thread, in which NCCL waits for it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Mapping

import torch

from amoe.errors import TransportError
from amoe.transport.base import Peer
from amoe.transport.buffer_pool import BufferPool
from amoe.transport.distributed_groups import GlooGroups, NcclGroups
from amoe.transport.distributed_link import Arrived, Link
from amoe.transport.distributed_pairing import End, Makers
from amoe.transport.distributed_payloads import take_over
from amoe.transport.loopback import Loopback
from amoe.transport.opening import DistributedSpec
from amoe.transport.wire import decode, layout_of
from amoe.types import Batch

logger = logging.getLogger(__name__)

_CLOSE_S = 1.5


class DistributedTransport:
    """One worker's end. See `amoe.transport.base.Transport`.

    Raises:
        ConfigError: nothing can listen at the host of `spec`.
    """

    def __init__(self, spec: DistributedSpec, rank: int, incarnation: int) -> None:
        self._spec = spec
        self._own = End(rank, incarnation)
        self._makers = _makers(spec)
        self._pool = BufferPool(spec.eager_bytes)
        self._links: dict[int, Link] = {}
        self._closing: list[threading.Thread] = []
        self._loopback = Loopback()
        self._arrived: deque[Arrived] = deque()
        self._delivered: list[Arrived] = []
        self._doorbell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._bell_lock = threading.Lock()  # a number that was closed may be another file by now
        self._is_closed = False

    @property
    def rank(self) -> int:
        return self._own.rank

    @property
    def address(self) -> str:
        return ""

    def update(self, peers: Mapping[int, Peer]) -> None:
        wanted = {rank: End(rank, peer.incarnation) for rank, peer in peers.items() if self._talks_to(rank)}
        for rank in [rank for rank, link in self._links.items() if wanted.get(rank) != link.peer]:
            self._close_link(self._links.pop(rank))
        for rank in wanted.keys() - self._links.keys():
            self._links[rank] = Link(self._spec, self._makers, self._own, wanted[rank], self._pool, self._on_arrival)

    def send(self, batch: Batch) -> None:
        dst = batch.dst
        if dst == self._own.rank:
            self._loopback.put(batch)
            self._ring()
            return
        link = self._links.get(dst)
        if link is None:
            if not 0 <= dst < self._spec.num_ranks:
                raise TransportError(f"there is no worker of rank {dst}")
            return
        layout = layout_of(batch)
        if layout.size > self._spec.max_record_bytes:
            raise TransportError(
                f"a record of {layout.size} bytes exceeds the {self._spec.max_record_bytes} of this cluster"
            )
        link.send(batch, layout)

    def poll(self) -> list[Batch]:
        # First the doorbell, then the queue: what comes in between rings again.
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._doorbell)
        for arrived in self._delivered:
            self._pool.give(arrived.buffer)
        self._delivered.clear()
        batches = self._loopback.take() if self._loopback else []
        for _ in range(len(self._arrived)):
            arrived = self._arrived.popleft()
            self._delivered.append(arrived)
            batch = self._decode(arrived)
            if batch is not None:
                batches.append(batch)
        return batches

    def flush(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._doorbell

    def close(self) -> None:
        """A link that is just being set up may take seconds to notice; its threads then end by themselves."""
        if self._is_closed:
            return
        deadline = time.monotonic() + _CLOSE_S
        for link in self._links.values():
            self._close_link(link)
        self._links.clear()
        for thread in self._closing:
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._bell_lock:
            self._is_closed = True
            os.close(self._doorbell)
        self._delivered.clear()
        self._arrived.clear()

    def _talks_to(self, rank: int) -> bool:
        """Every exchange has a home at one end."""
        if rank == self._own.rank:
            return False
        return not self._spec.num_homes or min(rank, self._own.rank) < self._spec.num_homes

    def _close_link(self, link: Link) -> None:
        """Beside the caller, for it takes milliseconds."""
        self._closing = [thread for thread in self._closing if thread.is_alive()]
        thread = threading.Thread(target=link.close, name=f"amoe-unlink-{link.peer.rank}", daemon=True)
        thread.start()
        self._closing.append(thread)

    def _on_arrival(self, arrived: Arrived) -> None:
        if not self._is_closed:
            self._arrived.append(arrived)
            self._ring()

    def _ring(self) -> None:
        with self._bell_lock:
            if not self._is_closed:
                os.eventfd_write(self._doorbell, 1)

    def _decode(self, arrived: Arrived) -> Batch | None:
        """None: it is from a link that has been closed, or not what the link's peer may send."""
        take_over(arrived.payload)
        if arrived.link.is_closed:
            return None
        try:
            batch = decode(arrived.buffer, 0, arrived.nbytes, arrived.payload)
        except TransportError as error:
            logger.warning("dropped a message of worker %d: %s", arrived.link.peer.rank, error)
            return None
        if (batch.src, batch.dst) != (arrived.link.peer.rank, self._own.rank):
            logger.warning(
                "dropped a message of worker %d: from %d to %d", arrived.link.peer.rank, batch.src, batch.dst
            )
            return None
        return batch


def _makers(spec: DistributedSpec) -> Makers:
    records = GlooGroups(spec.host)
    device = torch.device(spec.device)
    if device.type == "cuda":
        return Makers(records, NcclGroups(device))
    return Makers(records, records if spec.splits_payloads else None)

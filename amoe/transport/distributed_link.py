"""One worker's link to one life of another, over the process groups of the two, and its threads."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from amoe.errors import TransportError
from amoe.transport.buffer_pool import BufferPool
from amoe.transport.distributed_groups import FOREVER
from amoe.transport.distributed_pairing import End, Makers, Pair, Pairing
from amoe.transport.distributed_payloads import OwnCopy, Sending
from amoe.transport.opening import DistributedSpec
from amoe.transport.wire import Layout, WireBuffer, encode_into, layout_at
from amoe.types import Batch

logger = logging.getLogger(__name__)

_HEAD_TAG, _REST_TAG = 0, 1
# Receives that stand ready. gloo sends nothing before the other side has said that it is ready for it: with a single
# one, every record would wait for a round trip of the network behind the one before.
_READY = 8


class Outgoing(NamedTuple):
    """A record that is to be sent."""

    buffer: WireBuffer
    nbytes: int  # of the record, without a payload that travels beside it
    payload: OwnCopy | None  # ... that one


class Posted(NamedTuple):
    """What has been given to the groups."""

    pair: Pair
    works: list[Any]
    buffer: WireBuffer
    sending: Sending | None


class Arrived(NamedTuple):
    """A record that has come."""

    link: Link
    buffer: WireBuffer
    nbytes: int
    payload: torch.Tensor | None


class Link:
    """Connects, sends and receives, and connects anew when the connection breaks while both live.

    Args:
        pool: of the buffers of both directions, shared by all links of the worker.
        on_arrival: called in the receiving thread.
    """

    def __init__(
        self,
        spec: DistributedSpec,
        makers: Makers,
        own: End,
        peer: End,
        pool: BufferPool,
        on_arrival: Callable[[Arrived], None],
    ) -> None:
        self.peer = peer
        self._spec = spec
        self._device = torch.device(spec.device)
        self._has_payload_groups = makers.payloads is not None
        self._pool = pool
        self._on_arrival = on_arrival
        self._stopped = threading.Event()
        self._pairing = Pairing(spec, makers, own, peer, self._stopped)
        self._lock = threading.Lock()  # of the next two; held for no longer than it takes to post
        self._pair: Pair | None = None
        self._waiting: deque[Outgoing] = deque()  # for a connection
        self._posted: queue.SimpleQueue[Posted | None] = queue.SimpleQueue()
        name = f"amoe-link-{peer.rank}"
        self._threads = [
            threading.Thread(target=self._run, name=name, daemon=True),
            threading.Thread(target=self._reclaim, name=f"{name}-sent", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def is_closed(self) -> bool:
        return self._stopped.is_set()

    def send(self, batch: Batch, layout: Layout) -> None:
        """Post `batch`, or keep it until there is a connection."""
        is_beside = self._has_payload_groups and layout.n > 0
        nbytes = layout.payload if is_beside else layout.size
        buffer = self._pool.take(max(nbytes, self._spec.eager_bytes))
        encode_into(batch, buffer, 0, layout, with_payload=not is_beside)
        payload = OwnCopy.of(batch.payload, self._device) if is_beside and batch.payload is not None else None
        with self._lock:
            outgoing = Outgoing(buffer, nbytes, payload)
            if self._pair is None or not self._post(self._pair, outgoing):
                self._waiting.append(outgoing)

    def close(self) -> None:
        """Break everything off, and wait for the threads. What has not been sent is dropped."""
        self._stopped.set()
        with self._lock:
            pair, self._pair = self._pair, None
            self._waiting.clear()
        if pair is not None:
            pair.break_off()
        for thread in self._threads:
            thread.join()

    def _post(self, pair: Pair, outgoing: Outgoing) -> bool:
        """Give a record to the groups. False: the connection is broken."""
        buffer, nbytes, payload = outgoing
        peer, eager = 1 - pair.own, self._spec.eager_bytes
        try:
            works = [pair.records.send([buffer.tensor[:eager]], peer, _HEAD_TAG)]
            if nbytes > eager:
                works.append(pair.records.send([buffer.tensor[eager:nbytes]], peer, _REST_TAG))
            sending = pair.payloads.send(payload) if pair.payloads is not None and payload is not None else None
        except RuntimeError:
            self._pair = None
            # Beside the caller, for it takes its time. The receiving thread notices, and connects anew.
            threading.Thread(target=pair.break_off, name=f"amoe-broken-{self.peer.rank}", daemon=True).start()
            return False
        self._posted.put(Posted(pair, works, buffer, sending))
        return True

    def _run(self) -> None:
        """The receiving thread."""
        while (pair := self._pairing.next_pair()) is not None:
            try:
                self._open(pair)
                self._receive(pair)
            except (RuntimeError, TransportError) as error:
                if not self._stopped.is_set():
                    # The end of the peer, mostly: whoever watches the workers has more to say about that.
                    logger.info("the link to worker %d broke off: %s", self.peer.rank, str(error).splitlines()[0])
            finally:
                with self._lock:
                    self._pair = None
                pair.break_off()
        self._posted.put(None)

    def _open(self, pair: Pair) -> None:
        """From now on `send` posts; first what has waited."""
        with self._lock:
            if self._stopped.is_set():
                return
            while self._waiting:
                if not self._post(pair, self._waiting[0]):
                    return
                self._waiting.popleft()
            self._pair = pair

    def _receive(self, pair: Pair) -> None:
        """Take records until the connection breaks.

        Raises:
            RuntimeError: it is broken.
            TransportError: what comes is not a record.
        """
        peer, eager = 1 - pair.own, self._spec.eager_bytes
        ready: deque[tuple[WireBuffer, Any]] = deque()
        while not self._stopped.is_set():
            while len(ready) < _READY:
                buffer = self._pool.take(eager)
                ready.append((buffer, pair.records.recv([buffer.tensor[:eager]], peer, _HEAD_TAG)))
            buffer, work = ready.popleft()
            work.wait(FOREVER)
            layout = layout_at(buffer)
            is_beside = pair.payloads is not None and layout.n > 0
            nbytes = layout.payload if is_beside else layout.size
            if layout.size > self._spec.max_record_bytes:
                raise TransportError(f"a record of {layout.size} bytes exceeds {self._spec.max_record_bytes}")
            if nbytes > eager:
                head, buffer = buffer, self._pool.take(nbytes)
                buffer.octets[:eager] = head.octets[:eager]
                self._pool.give(head)
                pair.records.recv([buffer.tensor[eager:nbytes]], peer, _REST_TAG).wait(FOREVER)
            payload = pair.payloads.receive(layout) if pair.payloads is not None and is_beside else None
            self._on_arrival(Arrived(self, buffer, nbytes, payload))

    def _reclaim(self) -> None:
        """The other thread: gives buffers back when they have been sent, in the order in which they were posted."""
        while (posted := self._posted.get()) is not None:
            with contextlib.suppress(RuntimeError):  # broken: the buffer is left to the garbage collector
                for work in posted.works:
                    work.wait(FOREVER)
                if posted.sending is not None and posted.pair.payloads is not None:
                    posted.pair.payloads.wait_sent(posted.sending)
                self._pool.give(posted.buffer)

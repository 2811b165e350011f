"""Transport between hosts: ZeroMQ over TCP, one listening socket per worker and one outgoing socket per destination.

Each message is one record of `amoe.transport.wire`, with the secret of the cluster behind it. ZeroMQ's own thread does
the input and output, reconnects when a link breaks, and keeps what waits; nothing here blocks, and a slow destination
holds up no other, because each has its own socket and queue.

Bounds. ZeroMQ's queues have no limit here, since a limit would mean to block or to lose. They are bounded all the same:
a home has at most `num_token_slots` tokens on their way, each at most once per destination, and sends one again only
when it has waited for `failure.timeout_s`, and then for twice as long; an expert worker only answers. What waits for a
destination that is gone is dropped by `update`.

Cut links. The kernel gives a connection up on which nothing is acknowledged for `link_timeout_s` (TCP_USER_TIMEOUT;
heartbeats see to it that there is something to acknowledge), and ZeroMQ sets up the next one, with a few attempts per
second. TCP alone would try again ever more rarely, and so find a link that is back as late again as it was cut. What
was in the kernel then is lost: homes send again what stays unanswered. A shorter cut loses nothing.

Descriptor. ZeroMQ's is readable while its socket has news, which the socket takes in when it is used: it then tells
nothing of messages that are still unread. So `poll` reads until there are none; where it has to stop before, and for
batches to this very worker, it rings an eventfd. An epoll over both is what `fileno` returns.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import select
import socket
from collections.abc import Mapping

import zmq

from amoe.errors import ConfigError, TransportError
from amoe.transport.base import Peer
from amoe.transport.loopback import Loopback
from amoe.transport.opening import TcpSpec
from amoe.transport.record_size import ALIGNMENT
from amoe.transport.wire import WireBuffer, decode, encode_into, layout_of
from amoe.types import Batch

logger = logging.getLogger(__name__)

_TRAILER_BYTES = 16
_LEAST_ARENA_BYTES = 1 << 20
_RECONNECT_MS, _MOST_RECONNECT_MS, _CONNECT_MS = 20, 250, 500
_HEARTBEATS_PER_TIMEOUT = 4
_SILENCE_TIMEOUTS = 5  # without any answer to heartbeats, though the kernel acknowledges: a stopped process, say


class TcpTransport:
    """One worker's end. See `amoe.transport.base.Transport`.

    Raises:
        ConfigError: nothing can listen at the host of `spec`.
    """

    def __init__(self, spec: TcpSpec, rank: int) -> None:
        self._spec = spec
        self._rank = rank
        self._context = zmq.Context()
        self._inbox = _Inbox(self._context, spec, rank)
        # Made when first needed, since not all ranks talk to all; None: no connection can be made.
        self._outboxes: dict[int, zmq.Socket[bytes] | None] = {}
        self._scratch = WireBuffer.allocate(spec.max_record_bytes + _TRAILER_BYTES)
        self._trailer = _trailer(spec.secret)
        self._peers: dict[int, Peer] = {}
        self._loopback = Loopback()
        self._alarm = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._inbox.fileno(), select.EPOLLIN)
        self._epoll.register(self._alarm, select.EPOLLIN)

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def address(self) -> str:
        return self._inbox.address

    def update(self, peers: Mapping[int, Peer]) -> None:
        for dst in [dst for dst in self._outboxes if peers.get(dst) != self._peers.get(dst)]:
            outbox = self._outboxes.pop(dst)
            if outbox is not None:
                outbox.close(linger=0)
        self._peers = dict(peers)

    def send(self, batch: Batch) -> None:
        dst = batch.dst
        if dst == self._rank:
            self._loopback.put(batch)
            os.eventfd_write(self._alarm, 1)
            return
        if dst not in self._outboxes:
            self._connect(dst)
        outbox = self._outboxes.get(dst)
        if outbox is None:
            return
        layout = layout_of(batch)
        size = layout.size
        if size > self._spec.max_record_bytes:
            raise TransportError(f"a record of {size} bytes exceeds the {self._spec.max_record_bytes} of this cluster")
        octets = self._scratch.octets
        encode_into(batch, self._scratch, 0, layout)
        octets[size : size + _TRAILER_BYTES] = self._trailer
        with contextlib.suppress(zmq.Again):  # cannot be without a limit; if it is, it is as good as a cut link
            outbox.send(octets[: size + _TRAILER_BYTES], zmq.DONTWAIT)

    def poll(self) -> list[Batch]:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._alarm)
        batches = self._loopback.take() if self._loopback else []
        if not self._inbox.receive(batches):
            os.eventfd_write(self._alarm, 1)
        return batches

    def flush(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._epoll.fileno()

    def close(self) -> None:
        if self._epoll.closed:
            return
        self._epoll.close()
        os.close(self._alarm)
        self._context.destroy(linger=0)

    def _connect(self, dst: int) -> None:
        """Make the socket to `dst`, if somebody is there; its connection comes about beside the caller."""
        if not 0 <= dst < self._spec.num_ranks:
            raise TransportError(f"there is no worker of rank {dst}")
        peer = self._peers.get(dst)
        if peer is None or not peer.address:
            return
        outbox = self._context.socket(zmq.PUSH)
        _configure(outbox, self._spec, is_ipv6="[" in peer.address)
        outbox.sndhwm = 0
        outbox.reconnect_ivl, outbox.reconnect_ivl_max = _RECONNECT_MS, _MOST_RECONNECT_MS
        outbox.connect_timeout = _CONNECT_MS
        try:
            outbox.connect(peer.address)
            self._outboxes[dst] = outbox
        except zmq.ZMQError as error:
            outbox.close(linger=0)
            self._outboxes[dst] = None
            logger.error("worker %d is said to be at %r: %s", dst, peer.address, error.strerror)


class _Inbox:
    """The listening socket, and the memory that one `poll`'s batches are read from.

    Attributes:
        address: where others reach it.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], spec: TcpSpec, rank: int) -> None:
        self._rank = rank
        self._num_ranks = spec.num_ranks
        self._trailer = _trailer(spec.secret)
        self._arena = WireBuffer.allocate(max(spec.max_record_bytes, _LEAST_ARENA_BYTES))
        self._unread: zmq.Frame | None = None  # it did not fit behind the others
        self._num_strange = 0
        host = _numeric(spec.host)
        self._socket = context.socket(zmq.PULL)
        _configure(self._socket, spec, is_ipv6=":" in host)
        self._socket.rcvhwm = 0
        self._socket.maxmsgsize = self._arena.nbytes + _TRAILER_BYTES
        try:
            self._socket.bind(f"tcp://[{host}]:*" if ":" in host else f"tcp://{host}:*")
        except zmq.ZMQError as error:
            context.destroy(linger=0)
            raise ConfigError(f"nothing can listen at {spec.host!r}: {error.strerror}") from error
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def fileno(self) -> int:
        return self._socket.fileno()

    def receive(self, batches: list[Batch]) -> bool:
        """Append what has come; it is valid until the next call. False: there is more."""
        used = 0
        while True:
            frame, self._unread = self._unread, None
            if frame is None:
                try:
                    frame = self._socket.recv(zmq.DONTWAIT, copy=False)
                except zmq.Again:
                    return True
            octets = frame.buffer
            size = len(octets) - _TRAILER_BYTES  # below 0: it has not got the trailer either
            if size % ALIGNMENT or octets[size:] != self._trailer:
                self._drop("it is not of this cluster")
                continue
            if used + size > self._arena.nbytes:
                self._unread = frame
                return False
            self._arena.octets[used : used + size] = octets[:size]
            try:
                batch = decode(self._arena, used, size)
            except TransportError as error:
                self._drop(str(error))
                continue
            if batch.dst != self._rank or batch.src == self._rank or batch.src >= self._num_ranks:
                self._drop(f"it is from {batch.src} to {batch.dst}")
                continue
            batches.append(batch)
            used += size

    def _drop(self, reason: str) -> None:
        self._num_strange += 1
        if self._num_strange & (self._num_strange - 1) == 0:  # 1, 2, 4, 8, ...: whoever floods the port floods no log
            logger.warning("dropped message number %d that is none of ours: %s", self._num_strange, reason)


def _trailer(secret: str) -> bytes:
    return hashlib.blake2b(secret.encode(), digest_size=_TRAILER_BYTES).digest()


def _numeric(host: str) -> str:
    """The address of `host`: what others connect to must mean the same everywhere."""
    try:
        return str(socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise ConfigError(f"the host {host!r} has no address: {error.strerror}") from error


def _configure(end: zmq.Socket[bytes], spec: TcpSpec, *, is_ipv6: bool) -> None:
    """What both ends of a link need."""
    timeout_ms = max(1, int(spec.link_timeout_s * 1000))
    end.linger = 0
    end.ipv6 = is_ipv6
    end.tcp_maxrt = timeout_ms
    end.heartbeat_ivl = max(1, timeout_ms // _HEARTBEATS_PER_TIMEOUT)
    end.heartbeat_timeout = _SILENCE_TIMEOUTS * timeout_ms

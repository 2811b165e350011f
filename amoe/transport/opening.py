"""Which transport a worker opens, as data that travels to it; and what the owner of a cluster keeps for them all.

    owner of the cluster:  fabric = create_fabric(...)         one per cluster, closed after its workers
                           spec = fabric.spec_for(host)        JSON in the worker's launch
    worker:                open_transport(spec, rank, incarnation)

The modules of the transports are imported by whoever uses one: a worker on shared memory needs no ZeroMQ, and a server
that makes a fabric no torch.
"""

from __future__ import annotations

import secrets
from typing import Protocol

import msgspec

from amoe.config import TransportName
from amoe.transport.base import Transport
from amoe.transport.shm_fabric import ShmFabric, ShmSpec

DEFAULT_LINK_TIMEOUT_S = 2.0
EAGER_BYTES = 16 << 10  # a decode step's tokens for one owner mostly fit; on 10 Gbit/s they take 13 µs


class TcpSpec(msgspec.Struct, frozen=True, kw_only=True, tag="tcp"):
    """ZeroMQ over TCP, see `amoe.transport.tcp`.

    Attributes:
        num_ranks: ranks that there may ever be.
        host: name or address of this worker's host at which the others reach it; it listens there only.
        max_record_bytes: of the largest batch; a peer that sends more is cut off.
        secret: shared by the workers of one cluster; what comes without it is dropped. It keeps strangers and the
            workers of other clusters out, but it crosses the network as it is: the network has to be trusted.
        link_timeout_s: a link on which nothing is acknowledged for so long is taken down and set up again.
    """

    num_ranks: int
    host: str
    max_record_bytes: int
    secret: str
    link_timeout_s: float = DEFAULT_LINK_TIMEOUT_S


class DistributedSpec(msgspec.Struct, frozen=True, kw_only=True, tag="distributed"):
    """torch.distributed point to point, see `amoe.transport.distributed`.

    Attributes:
        num_ranks: ranks that there may ever be.
        num_homes: the attention workers, which have the first ranks; two others never talk. 0: all may be homes.
        store_host, store_port: of the `Rendezvous`.
        host: name or address of this worker's host at which the others reach it.
        device: torch device of this worker's payloads: they travel by NCCL between CUDA devices, by gloo otherwise.
        max_record_bytes: of the largest batch.
        eager_bytes: of the message that every batch begins with; what a batch has beyond it follows in a second one.
            A multiple of 64, and the same everywhere.
        splits_payloads: payloads travel beside their records on CPUs, too: slower, and what tests of that path use.
    """

    num_ranks: int
    num_homes: int
    store_host: str
    store_port: int
    host: str
    device: str
    max_record_bytes: int
    eager_bytes: int = EAGER_BYTES
    splits_payloads: bool = False


TransportSpec = ShmSpec | TcpSpec | DistributedSpec


class Fabric(Protocol):
    """What the owner of a cluster keeps for the transports of its workers, from the first to the last of them."""

    def spec_for(self, host: str, device: str = "cpu") -> TransportSpec:
        """For a worker on `host` (the name or address at which the other workers reach it) with its payloads on the
        torch device `device`."""
        ...

    def fds(self) -> tuple[int, ...]:
        """Descriptors that a worker's process must inherit under the same numbers."""
        ...

    def close(self) -> None:
        """Give everything back. Idempotent."""
        ...


def create_fabric(
    transport: TransportName,
    *,
    num_ranks: int,
    num_homes: int,
    max_record_bytes: int,
    host: str = "127.0.0.1",
    link_timeout_s: float = DEFAULT_LINK_TIMEOUT_S,
) -> Fabric:
    """The fabric of a cluster.

    Args:
        num_ranks, num_homes: ranks that there may ever be, and attention workers among them (the first).
        max_record_bytes: of the largest batch, see `amoe.transport.record_size`.
        host: of this process, at which the workers reach it.
        link_timeout_s: see `TcpSpec`.

    Raises:
        ConfigError: nothing can listen at `host`.
    """
    if transport == "shm":
        return ShmFabric.create(num_ranks, max_record_bytes)
    if transport == "tcp":
        return TcpFabric(num_ranks, max_record_bytes, link_timeout_s)
    from amoe.transport.rendezvous import DistributedFabric

    return DistributedFabric(num_ranks, num_homes, max_record_bytes, host)


class TcpFabric:
    """Nothing but what the workers have in common: they find each other by `Transport.address`."""

    def __init__(self, num_ranks: int, max_record_bytes: int, link_timeout_s: float = DEFAULT_LINK_TIMEOUT_S) -> None:
        self._num_ranks = num_ranks
        self._max_record_bytes = max_record_bytes
        self._link_timeout_s = link_timeout_s
        self._secret = secrets.token_hex(16)

    def spec_for(self, host: str, device: str = "cpu") -> TcpSpec:
        return TcpSpec(
            num_ranks=self._num_ranks,
            host=host,
            max_record_bytes=self._max_record_bytes,
            secret=self._secret,
            link_timeout_s=self._link_timeout_s,
        )

    def fds(self) -> tuple[int, ...]:
        return ()

    def close(self) -> None:
        """There is nothing to give back."""


def open_transport(spec: TransportSpec, rank: int, incarnation: int = 0) -> Transport:
    """The end of worker `rank` in its life number `incarnation`; it talks to nobody before `update`, but for shared
    memory, where all peers are known from the beginning.

    Raises:
        ConfigError: nothing can listen at the host of `spec`.
    """
    if isinstance(spec, ShmSpec):
        from amoe.transport.shm import ShmTransport

        return ShmTransport.attach(spec, rank)
    if isinstance(spec, TcpSpec):
        from amoe.transport.tcp import TcpTransport

        return TcpTransport(spec, rank)
    from amoe.transport.distributed import DistributedTransport

    return DistributedTransport(spec, rank, incarnation)

"""The one protocol by which workers exchange tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from amoe.types import Batch


class Peer(NamedTuple):
    """Another worker, as a transport knows it.

    Attributes:
        incarnation: which life of the worker it is; one that is started anew has the next one.
        address: what that worker's own `Transport.address` said; "" where the transport needs none.
    """

    incarnation: int
    address: str = ""


class Transport(Protocol):
    """One worker's end: sends batches to ranks, its own included, and collects what has come for it.

    Nothing here blocks, and whatever is sent to a worker that lives on arrives once and in order per pair of workers;
    a link that is cut may lose some of it. Everything in flight is bounded by the token slots of the homes, so a
    backlog inside a transport is bounded as well.
    """

    @property
    def rank(self) -> int:
        """The rank of this end."""
        ...

    @property
    def address(self) -> str:
        """Where the other ends find this one; "" where they need nothing but the rank."""
        ...

    def update(self, peers: Mapping[int, Peer]) -> None:
        """From now on these are the other workers, by rank (this one may be among them).

        What is unsent to one that is not among them, or in another life, is dropped, and whatever was set up with it
        is given back; links to new ones are set up beside the caller. Nothing here waits for a peer.
        """
        ...

    def send(self, batch: Batch) -> None:
        """Take `batch` for delivery to `batch.dst`. Its arrays and payload may be reused once this returns.

        To a worker that is gone, or that has not been heard of: it is dropped, and `update` will tell in time.

        Raises:
            TransportError: there can be no worker of that rank, or the batch cannot travel.
        """
        ...

    def poll(self) -> list[Batch]:
        """Batches that have arrived, also from this very worker. Their arrays and payloads are valid until the next
        `poll`: whoever keeps them copies them.

        Raises:
            TransportError: a peer broke the wire protocol.
        """
        ...

    def flush(self) -> bool:
        """Go on sending what did not fit. True when nothing is left."""
        ...

    def fileno(self) -> int:
        """A descriptor that becomes readable when `poll` or `flush` may have work; `poll` resets it."""
        ...

    def close(self) -> None:
        """Give everything back. Idempotent."""
        ...

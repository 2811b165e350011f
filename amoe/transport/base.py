"""The one protocol by which workers exchange tokens."""

from __future__ import annotations

from typing import Protocol

from amoe.types import Batch


class Transport(Protocol):
    """One worker's end: sends batches to ranks, its own included, and collects what has come for it.

    Nothing here blocks, and whatever is sent arrives once and in order per pair of workers. Everything in flight is
    bounded by the token slots of the homes, so a backlog inside a transport is bounded as well.
    """

    @property
    def rank(self) -> int:
        """The rank of this end."""
        ...

    def send(self, batch: Batch) -> None:
        """Take `batch` for delivery to `batch.dst`. Its arrays and payload may be reused once this returns.

        Raises:
            TransportError: the destination is unknown or gone.
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

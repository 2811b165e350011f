"""Batches that a worker sends to itself: handed over by reference, in order."""

from __future__ import annotations

from amoe.types import Batch


class Loopback:
    """The part of every transport that serves its own rank.

    Nothing is copied and nothing encoded: the payload may be None (the worker finds the rows in its own tables), and
    arrays of a batch to oneself must stay as they are until the batch has been polled and used, unlike those of a batch
    to another worker.
    """

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: list[Batch] = []

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def put(self, batch: Batch) -> None:
        """Queue `batch`."""
        self._waiting.append(batch)

    def take(self) -> list[Batch]:
        """All that is queued, oldest first; the caller owns the list."""
        taken, self._waiting = self._waiting, []
        return taken

"""Counts what a worker sends, as it is sent."""

from __future__ import annotations

from amoe.stats import TrafficSnapshot
from amoe.types import Batch, BatchKind


class TrafficCounts:
    """Batches, rows and bytes of hidden states by kind of batch, to this very worker and to others.

    What goes to whom in detail is decided by placement and routing, which other series tell; a series for every pair
    of workers would be many.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._counts = {kind: ([0, 0, 0], [0, 0, 0]) for kind in BatchKind}  # to this worker, to others

    def count(self, batch: Batch) -> None:
        """`batch` is about to be sent."""
        counts = self._counts[batch.kind][batch.dst != self._rank]
        counts[0] += 1
        if batch.kind is not BatchKind.ANNOUNCE:  # whose count is of tokens that come later
            counts[1] += batch.count
        if batch.payload is not None:
            counts[2] += batch.payload.nbytes

    def snapshot(self) -> list[TrafficSnapshot]:
        """What has been sent at least once."""
        return [
            TrafficSnapshot(kind.name.lower(), path, *counts)
            for kind, both in self._counts.items()
            for path, counts in zip(("local", "remote"), both, strict=True)
            if counts[0]
        ]

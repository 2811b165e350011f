"""Counts what a worker's scheduler decides, and why."""

from __future__ import annotations

from amoe.policy.decision import Reason
from amoe.stats import DecisionSnapshot
from amoe.types import BlockKind

_ALL_BLOCKS, _NO_BLOCK = len(BlockKind), len(BlockKind) + 1
_BLOCK_NAMES = [*(kind.name.lower() for kind in BlockKind), "forward", "none"]


class DecisionCounts:
    """One counter per kind of block and reason. Counting costs two list look-ups: it happens at every turn."""

    def __init__(self) -> None:
        self._counts = [[0] * len(Reason) for _ in _BLOCK_NAMES]

    def ran(self, kind: BlockKind, reason: Reason) -> None:
        """A block runs."""
        self._counts[kind][reason] += 1

    def ran_all(self) -> None:
        """All of them run, as one step: there is nothing else that could."""
        self._counts[_ALL_BLOCKS][Reason.ONLY] += 1

    def waited(self, reason: Reason) -> None:
        """None does."""
        self._counts[_NO_BLOCK][reason] += 1

    def snapshot(self) -> list[DecisionSnapshot]:
        """What has happened at least once."""
        return [
            DecisionSnapshot(name, reason.name.lower(), counts[reason])
            for name, counts in zip(_BLOCK_NAMES, self._counts, strict=True)
            for reason in Reason
            if counts[reason]
        ]

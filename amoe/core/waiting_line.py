"""Sequences that wait for a row and KV blocks, in the order in which they are admitted.

A *sibling* (another choice of one user's request) has the prompt of a sequence that came before it. It stands aside
until that one has computed the prompt, or has gone: then it joins the line at its place, and finds the prompt's KV.
Whoever stands aside keeps nobody else waiting.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

from amoe.core.sequence import Sequence

_order = attrgetter("order")


class WaitingLine:
    """Waiting sequences by `Sequence.order`, and those that stand aside, by the request that they wait for."""

    def __init__(self) -> None:
        self._line: list[Sequence] = []
        self._aside: dict[int, list[Sequence]] = {}
        self._leader_of: dict[int, int] = {}  # of those that stand aside
        self._by_id: dict[int, Sequence] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Sequence]:
        """All that wait, in order."""
        return iter(sorted(self._by_id.values(), key=_order))

    @property
    def num_aside(self) -> int:
        """Sequences that wait for another sequence, not for room."""
        return len(self._leader_of)

    @property
    def first(self) -> Sequence | None:
        """Whose turn it is."""
        return self._line[0] if self._line else None

    def find(self, request_id: int) -> Sequence | None:
        """The sequence of a request, if it waits."""
        return self._by_id.get(request_id)

    def add(self, sequence: Sequence) -> None:
        """A sequence takes its place."""
        self._by_id[sequence.request_id] = sequence
        insort(self._line, sequence, key=_order)

    def add_aside(self, sequence: Sequence, leader_id: int) -> None:
        """A sequence waits until `let_in(leader_id)`."""
        self._by_id[sequence.request_id] = sequence
        self._aside.setdefault(leader_id, []).append(sequence)
        self._leader_of[sequence.request_id] = leader_id

    def let_in(self, leader_id: int) -> None:
        """Whoever stands aside for this request takes its place in the line."""
        for sequence in self._aside.pop(leader_id, ()):
            del self._leader_of[sequence.request_id]
            insort(self._line, sequence, key=_order)

    def remove(self, sequence: Sequence) -> None:
        """A sequence that is here waits no longer."""
        del self._by_id[sequence.request_id]
        leader_id = self._leader_of.pop(sequence.request_id, None)
        if leader_id is None:
            del self._line[bisect_left(self._line, sequence.order, key=_order)]
            return
        self._aside[leader_id].remove(sequence)
        if not self._aside[leader_id]:
            del self._aside[leader_id]

"""Which workers there are, and in which life: what another life has sent, or was meant for, is ignored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from amoe.types import Batch, Int16Array

NOBODY = -1
_LIVES = 256  # incarnations travel modulo this: nothing is on its way for so many lives


@dataclass(frozen=True, slots=True)
class Roster:
    """Who serves, and where experts are computed, see `amoe.engine.messages.Topology`.

    Attributes:
        version: greater with every change.
        incarnations: by rank; `NOBODY` where nobody serves.
        owners: [num_layers, num_experts, R] indexes into `PlacementConfig.owner_ranks`, -1: no replica.
    """

    version: int
    incarnations: Sequence[int]
    owners: Int16Array


class Members:
    """The workers as the worker `rank` knows them.

    Args:
        incarnation: of this worker.
        incarnations: by rank, of all others; its own entry does not matter.

    Attributes:
        num_ignored: batches of or for another life.
    """

    def __init__(self, rank: int, incarnation: int, incarnations: Sequence[int]) -> None:
        self.incarnation = incarnation
        self.num_ignored = 0
        self._rank = rank
        self._incarnations = list(incarnations)
        self._incarnations[rank] = incarnation

    @property
    def incarnations(self) -> list[int]:
        """By rank, as they are known now."""
        return list(self._incarnations)

    def update(self, incarnations: Sequence[int]) -> list[int]:
        """Others serve from now on. Returns the ranks where something has changed, without this one."""
        new = list(incarnations)
        new[self._rank] = self.incarnation  # it may be on its way out, or not yet counted
        changed = [rank for rank, known in enumerate(self._incarnations) if new[rank] != known]
        self._incarnations = new
        return changed

    def has(self, rank: int) -> bool:
        """Somebody serves at this rank."""
        return self._incarnations[rank] != NOBODY

    def stamp(self, batch: Batch) -> None:
        """Note who sends `batch` to whom, in which lives."""
        batch.src_incarnation = self.incarnation % _LIVES
        batch.dst_incarnation = self._incarnations[batch.dst] % _LIVES

    def admits(self, batch: Batch) -> bool:
        """`batch` comes from the life of its sender that serves now, and was meant for this one."""
        known = self._incarnations[batch.src]
        admitted = (
            known != NOBODY
            and batch.src_incarnation == known % _LIVES
            and batch.dst_incarnation == self.incarnation % _LIVES
        )
        self.num_ignored += not admitted
        return admitted

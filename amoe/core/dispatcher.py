"""From pairs to batches: which expert workers a token goes to, and what each of them is sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from amoe.core.batcher import Batcher
from amoe.core.steps import Outgoing
from amoe.types import Batch, BatchKind, BlockId, BoolArray, Float32Array, Int16Array, Int32Array


class Pairs(NamedTuple):
    """What is computed for the n tokens of a step.

    Attributes:
        expert_ids: [n, P] int64, -1 where there is none.
        weights: [n, P] float32.
        owners: [n, P] who computes the pair, -1 where there is none; D: nobody can at the moment.
    """

    expert_ids: npt.NDArray[np.int64]
    weights: Float32Array
    owners: Int16Array


class Dispatcher:
    """Makes the dispatches of one home.

    Args:
        rank: of the home.
        owner_ranks: [D] ranks that expert workers may have; D itself stands for nobody.
        present: [D] owners that are there.
    """

    def __init__(self, rank: int, owner_ranks: Sequence[int], batcher: Batcher, present: BoolArray) -> None:
        self.owner_ranks = tuple(owner_ranks)
        self.nobody = len(owner_ranks)
        self.on_roster(present)
        self._rank = rank
        self._batcher = batcher

    def on_roster(self, present: BoolArray) -> None:
        """Others are there: ranks may be laid out for many more workers than there are, which must not cost a step."""
        self._there: list[int] = np.flatnonzero(present).tolist()

    def destinations(self, owners: Int16Array, *, may_be_nobody: bool) -> BoolArray:
        """[n, D + 1] whose answers tokens with pairs at `owners` [n, P] will wait for.

        Args:
            may_be_nobody: a pair may have nobody to compute it. Such a token waits for nobody (the last column) alone:
                nothing of it is sent before somebody is there.
        """
        dispatched = np.zeros((len(owners), self.nobody + 1), np.bool_)
        dispatched[np.arange(len(owners))[:, None], owners] = True
        dispatched[:, self.nobody] = False  # where -1, no pair, has left a trace as well
        if may_be_nobody and (parked := (owners == self.nobody).any(axis=1)).any():
            dispatched[parked] = False
            dispatched[parked, self.nobody] = True
        return dispatched

    def batches(
        self,
        block: BlockId,
        epoch: int | None,
        slots: Int32Array,
        rows: npt.NDArray[np.integer],
        pairs: Pairs,
        dispatched: BoolArray,
    ) -> list[Outgoing]:
        """One dispatch per expert worker that has something to do; where there is an epoch, one to every worker.

        Args:
            slots, rows: [n] of the tokens, and where their MoE inputs lie.
            dispatched: [n, D + 1], see `destinations`.
        """
        generations = self._batcher.slots.generation[slots]
        iterations = self._batcher.tokens.iteration[slots]
        expert_ids = pairs.expert_ids.astype(np.int16)
        outgoing = []
        for owner in self._there:
            chosen = np.flatnonzero(dispatched[:, owner])
            if len(chosen) == 0 and epoch is None:
                continue
            here = pairs.owners[chosen] == owner
            batch = Batch(
                kind=BatchKind.DISPATCH,
                src=self._rank,
                dst=self.owner_ranks[owner],
                layer=block.layer,
                wave=block.wave,
                epoch=epoch or 0,
                count=len(chosen),
                slots=slots[chosen],
                generations=generations[chosen],
                iterations=iterations[chosen],
                expert_ids=np.where(here, expert_ids[chosen], np.int16(-1)),
                expert_weights=pairs.weights[chosen],
            )
            outgoing.append(Outgoing(batch, rows[chosen].astype(np.int32)))
        return outgoing

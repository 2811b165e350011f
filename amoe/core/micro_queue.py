"""μ-queues: the tokens waiting for each block of one worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from amoe.policy.scheduler import NEVER, QueueView, num_stages
from amoe.types import BlockId, BlockKind, Int32Array

Columns = tuple[npt.NDArray[Any], ...]


def stage_of(kind: BlockKind, layer: int, num_layers: int) -> int:
    """Stage of a block: attention(l) 2l, experts(l) 2l + 1, head 2L."""
    if kind is BlockKind.HEAD:
        return 2 * num_layers
    return 2 * layer + (1 if kind is BlockKind.EXPERTS else 0)


class MicroQueues:
    """All μ-queues of a worker, and the statistics that policies read, kept up to date by array operations.

    A queue holds pushes, each a tuple of columns with one entry per token, and is drained whole. Nothing here depends
    on the number of tokens but the arrays themselves. Blocks that the worker does not hold stay empty.
    """

    def __init__(self, num_layers: int, num_waves: int) -> None:
        self.num_waves = num_waves
        self._num_layers = num_layers
        self._stages = num_stages(num_layers)
        num_blocks = num_waves * self._stages
        self._pushes: list[list[Columns]] = [[] for _ in range(num_blocks)]
        self.depth = np.zeros(num_blocks, np.int64)
        self.oldest = np.full(num_blocks, np.inf)
        self.min_kappa = np.full(num_blocks, NEVER, np.int64)

    def index(self, block: BlockId) -> int:
        """Number of a block."""
        return block.wave * self._stages + stage_of(block.kind, block.layer, self._num_layers)

    def block(self, index: int) -> BlockId:
        """Block of a number."""
        wave, stage = divmod(index, self._stages)
        if stage == 2 * self._num_layers:
            return BlockId(BlockKind.HEAD, self._num_layers, wave)
        return BlockId(BlockKind.EXPERTS if stage % 2 else BlockKind.ATTENTION, stage // 2, wave)

    def push(self, block: BlockId, columns: Columns, iterations: Int32Array, now: float) -> None:
        """Add tokens: `columns` have n entries each, `iterations` is [n]. Keeps the arrays: they must be the caller's
        to give away. n = 0 is nothing."""
        count = len(iterations)
        if count == 0:
            return
        index = self.index(block)
        self._pushes[index].append(columns)
        self.depth[index] += count
        if now < self.oldest[index]:
            self.oldest[index] = now
        kappa = int(iterations.min()) * self._stages + index % self._stages
        if kappa < self.min_kappa[index]:
            self.min_kappa[index] = kappa

    def drain(self, index: int) -> Columns | None:
        """All tokens of a block in the order of their arrival, as concatenated columns; None if it is empty."""
        pushes = self._pushes[index]
        if not pushes:
            return None
        self._forget(index)
        if len(pushes) == 1:
            return pushes[0]
        return tuple(np.concatenate(column) for column in zip(*pushes, strict=True))

    def move(self, source: int, target: int) -> None:
        """All tokens of a block go to the same block of another lane."""
        self._pushes[target] += self._pushes[source]
        self.depth[target] += self.depth[source]
        self.oldest[target] = min(self.oldest[target], self.oldest[source])
        self.min_kappa[target] = min(self.min_kappa[target], self.min_kappa[source])
        self._forget(source)

    def keep_only(self, index: int, keeps: Callable[[Columns], npt.NDArray[np.bool_]]) -> None:
        """Drop tokens from a queue: `keeps` tells of the columns of a push which of its tokens stay. Its age and least
        progress stay what they were: they may be those of tokens that are gone, until it is drained."""
        kept = [tuple(column[mask] for column in push) for push in self._pushes[index] if (mask := keeps(push)).any()]
        if not kept:
            self._forget(index)
            return
        self._pushes[index] = kept
        self.depth[index] = sum(len(push[0]) for push in kept)

    def pushes(self, index: int) -> Sequence[Columns]:
        """The columns of what waits for a block, push by push; not to be changed."""
        return self._pushes[index]

    def _forget(self, index: int) -> None:
        self._pushes[index] = []
        self.depth[index] = 0
        self.oldest[index] = np.inf
        self.min_kappa[index] = NEVER

    def waited_for_experts_s(self, now: float) -> float:
        """How long the oldest token here has waited for an expert; 0 if none waits."""
        oldest = self.oldest.reshape(self.num_waves, self._stages)[:, 1::2].min(initial=np.inf)
        return max(0.0, now - float(oldest))

    def view(self) -> QueueView:
        """Statistics for a policy of an async schedule: a block is ready when a token waits for it."""
        return QueueView(self.depth > 0, self.depth, self.oldest, self.min_kappa)

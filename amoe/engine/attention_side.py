"""The attention blocks of a worker that runs block by block: their steps, and the answers that come to them."""

from __future__ import annotations

import numpy as np
import torch

from amoe.core.attention import AttentionCore
from amoe.core.steps import AttentionStep, Outgoing
from amoe.engine.executor import AttentionBlocks
from amoe.engine.messages import Steer
from amoe.types import Batch, BoolArray


class AttentionSide:
    """Stands between the attention core and its kernels.

    Args:
        owner_of_rank: index of an expert worker among the expert workers.
    """

    def __init__(self, core: AttentionCore, blocks: AttentionBlocks, owner_of_rank: dict[int, int]) -> None:
        self._core = core
        self._blocks = blocks
        self._owner_of_rank = owner_of_rank
        self._topology_version = 0

    def run(self, step: AttentionStep, now: float) -> tuple[list[Outgoing], torch.Tensor | None]:
        """Run attention(layer). Returns what to dispatch, and the tensor [n, H] whose rows it names."""
        if step.num_tokens == 0:  # a wave marches on although its tokens are gone
            nothing = np.empty((0, 1))
            return self._core.on_attention(step, nothing.astype(np.int64), nothing.astype(np.float32), now), None
        routed = self._blocks.attention(step)
        if routed is None:
            return self._core.on_attention(step, None, None, now), None
        outgoing = self._core.on_attention(step, routed.topk_ids, routed.topk_weights, now, routed.scores)
        return outgoing, routed.moe_input

    def keep(self, batch: Batch, kept: BoolArray) -> None:
        """A RESULT has come; rows `kept` [n] are awaited."""
        self._blocks.keep(batch, self._owner_of_rank[batch.src], kept)

    @property
    def moe_inputs(self) -> torch.Tensor:
        """[S, H] by slot, of the tokens that may have to be sent again."""
        return self._blocks.moe_inputs

    def steer(self, message: Steer) -> None:
        """Tokens choose among the replicas of their experts by other shares. Nothing happens if the shares belong to
        another table than the one in force: the server will plan anew."""
        if message.version != self._topology_version:
            return
        shares = np.frombuffer(message.shares, "<f4")
        self._core.set_shares(shares.reshape(self._core.replica_shape))

    def on_topology(self, version: int) -> None:
        """Another topology is in force at the core."""
        self._topology_version = version

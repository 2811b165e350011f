"""What the workers that are there can serve, and what it means that one is not."""

from __future__ import annotations

import numpy as np

from amoe.cluster.cluster import WorkerCluster
from amoe.cluster.places import Place
from amoe.cluster.topology import NOBODY, TopologyBoard
from amoe.policy.rebalance import are_held_elsewhere, missing
from amoe.policy.supervision import can_serve
from amoe.types import BoolArray


class Coverage:
    """See above. Who is there is what the board says."""

    def __init__(self, cluster: WorkerCluster, board: TopologyBoard) -> None:
        self._cluster = cluster
        self._placement = cluster.config.placement
        self._degrades = cluster.config.failure.on_expert_loss == "reroute"
        self._board = board

    def can_serve(self) -> bool:
        """Whether tokens are served; False where nobody knows what is held where."""
        shape, present = self._cluster.shape, self._present
        if shape is None:
            return False
        num_homes = sum(rank in self._placement.attention_ranks for rank in self._board.present)
        num_missing = missing(self._board.owners, present, shape.sparse_layers)
        return can_serve(num_homes, int(present.sum()), num_missing, degrades=self._degrades)

    def consequence(self, place: Place) -> str:
        """Of a loss, for the log, once the worker has left the board."""
        waits = {
            "attention": "its sequences go on at others, or at its next life",
            "experts": "tokens for experts that it alone holds wait for its next life",
        }
        if self._degrades:
            waits["experts"] = "tokens go on without the experts that it alone holds"
        if place.role != "attention" and self._is_replicated(place.rank):
            waits["experts"] = "replicas of its experts take over"
        return waits.get(place.role, f"{waits['attention']}; {waits['experts']}")

    def _is_replicated(self, rank: int) -> bool:
        """Whether others who serve hold every expert that it holds."""
        shape, ranks = self._cluster.shape, self._placement.owner_ranks
        if shape is None or rank not in ranks:
            return False
        return are_held_elsewhere(self._board.owners, ranks.index(rank), self._present, shape.sparse_layers)

    @property
    def _present(self) -> BoolArray:
        """[D] who is there, of those that may hold experts."""
        return np.array([self._board.incarnations[rank] != NOBODY for rank in self._placement.owner_ranks])

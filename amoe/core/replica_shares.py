"""Which replica of an expert computes a pair, by shares that somebody else plans."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from amoe.policy.replicas import choose_replicas, cumulative_shares, present_first, primary_shares
from amoe.types import BoolArray, Int16Array

_GOLDEN = 0.6180339887498949  # its multiples, modulo 1, are as even as can be, wherever one stops
_LAST_PHASE = 1 - 1e-6


class ReplicaShares:
    """The choice of one home. It begins with everything at the primaries.

    Where nobody who is there has a replica of an expert, its pairs are for *nobody*, owner D.

    Args:
        owners: [num_layers, num_experts, R] owners of each expert's replicas, -1 where there is none.
        rank: of the home, so that homes do not all round the same way.
        num_owners: D.
        present: [D] owners that are there; None: all.

    Attributes:
        owners: [num_layers, num_experts, R] in force: those that are there, first.
        present: [D] owners that are there.
        shape: of `owners`, and of shares.
        num_owners: D + 1, nobody included.
        shares: [num_layers, num_experts, R] in force.
        has_missing: [num_layers] the layer has experts that nobody holds.
        has_choice: [num_layers] the layer has experts with several replicas that are there.
        holders: [num_layers, num_owners, num_experts] the owner has a replica of the expert.
        num_holders: [num_layers] owners that hold any, nobody not counted.
    """

    def __init__(self, owners: Int16Array, rank: int, num_owners: int, present: BoolArray | None = None) -> None:
        self.num_owners = num_owners + 1
        self._nobody = num_owners
        self._phases = _GOLDEN * (rank + np.arange(owners.shape[1]))
        self._batches = [0] * len(owners)
        self.place(owners, np.ones(num_owners, np.bool_) if present is None else present)

    def place(self, owners: Int16Array, present: BoolArray) -> None:
        """Replicas are at `owners` [num_layers, num_experts, R] from now on, and `present` [D] of the owners are there.
        It begins with everything at the first replica that is there."""
        self.present = present
        self.shape = owners.shape
        self._order, self.owners = present_first(owners, present)
        self._here: BoolArray = self.owners >= 0
        missing = ~np.any(self._here, axis=-1)
        self.owners[missing, 0] = self._nobody
        self.has_missing: BoolArray = np.any(missing, axis=1)
        self.has_choice: BoolArray = (self._here.sum(axis=-1) > 1).any(axis=-1)
        self.holders = self._find_holders()
        self.num_holders: list[int] = self.holders[:, :-1].any(axis=2).sum(axis=1).tolist()
        self._put(primary_shares(self.owners))

    def set(self, shares: npt.NDArray[np.floating]) -> None:
        """Other shares [num_layers, num_experts, R] of the replicas as they were placed. What owners that are not there
        would get goes to those that are.

        Raises:
            ValueError: they do not belong to these replicas.
        """
        shares = np.where(self._here, np.take_along_axis(shares, self._order, axis=-1), 0.0)
        total = shares.sum(axis=-1, keepdims=True)
        self._put(np.where(total > 0, shares / np.where(total > 0, total, 1.0), primary_shares(self.owners)))

    def _put(self, shares: npt.NDArray[np.floating]) -> None:
        self.shares = shares.astype(np.float64)
        self._upper = cumulative_shares(self.shares, self.owners)
        self._is_split: BoolArray = (self.shares > 0).sum(axis=-1) > 1
        # Where every expert has one replica with a share, the choice is a table.
        greatest = self.shares.argmax(axis=-1)[..., None]
        self._main: Int16Array = np.take_along_axis(self.owners, greatest, axis=-1)[..., 0]
        self._tables = [None if split.any() else table for split, table in zip(self._is_split, self._main, strict=True)]

    def choose(self, layer: int, topk_ids: npt.NDArray[np.int64]) -> Int16Array:
        """[n, K] owners of the pairs `topk_ids` [n, K]."""
        table = self._tables[layer]
        if table is not None:
            return table[topk_ids]
        self._batches[layer] += 1
        phase = np.minimum((self._phases + _GOLDEN * self._batches[layer]) % 1.0, _LAST_PHASE)
        return choose_replicas(topk_ids, self.owners[layer], self._upper[layer], self._is_split[layer], phase)

    def choose_pairs(self, layer: int, expert_ids: npt.NDArray[np.int64]) -> Int16Array:
        """[n, P] owners of pairs of which some may be none (id -1, owner -1)."""
        owners = self.choose(layer, np.maximum(expert_ids, 0))
        return np.where(expert_ids >= 0, owners, np.int16(-1))

    def holds_pairs(self, owner: int, layers: npt.NDArray[np.integer], expert_ids: npt.NDArray[np.int64]) -> BoolArray:
        """[n, P] the owner has a replica of the expert; `layers` [n] of tokens with pairs `expert_ids` [n, P]."""
        replicas = self.owners[layers[:, None], np.maximum(expert_ids, 0)]
        return (replicas == owner).any(axis=-1) & (expert_ids >= 0)

    def main_owner(self, layer: int) -> npt.NDArray[np.int64]:
        """[E] owner of the replica that has the greatest share of each expert."""
        return self._main[layer].astype(np.int64)

    def experts_held(self, layer: int) -> npt.NDArray[np.float64]:
        """[D] experts of a layer at each owner: the sum of the shares that it has of them."""
        owners, shares = self.owners[layer], self.shares[layer]
        exists = owners >= 0
        return np.bincount(owners[exists], weights=shares[exists], minlength=self.num_owners).astype(np.float64)

    def _find_holders(self) -> BoolArray:
        layers, experts, copies = np.nonzero(self.owners >= 0)
        holders: BoolArray = np.zeros((len(self.owners), self.num_owners, self.owners.shape[1]), np.bool_)
        holders[layers, self.owners[layers, experts, copies], experts] = True
        return holders

    def holds(self, layer: int) -> BoolArray:
        """[E, D]: the owner has a replica of the expert."""
        return self.holders[layer].T

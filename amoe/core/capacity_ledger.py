"""What capacity has taken: from which experts, and from which sequences."""

from __future__ import annotations

import numpy as np

from amoe.core.sequence import NUM_USAGE_COLUMNS, SequenceTable, UsageColumn
from amoe.policy.capacity import RoutedBatch, Selection
from amoe.policy.matching import FloatArray
from amoe.stats import CapacitySnapshot
from amoe.types import Int32Array, Int64Array


class CapacityLedger:
    """The accounts of one home.

    Attributes:
        lost: [num_layers, num_experts, 2] pairs that an expert was spared: dropped, rerouted to another expert.
        num_over: pairs beyond the capacity that were computed all the same: of exact requests, or a token's best.
            Counted in batches from which something could be taken.
        mass_lost, tokens: sum over tokens and layers of the lost part of the gate mass, and how many they were.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.lost: Int64Array = np.zeros((num_layers, num_experts, 2), np.int64)
        self.num_over = 0
        self.mass_lost = 0.0
        self.tokens = 0

    def snapshot(self, reason: str) -> CapacitySnapshot:
        """For the server; `reason`: why pairs are taken."""
        layers, experts = np.nonzero(self.lost.any(axis=-1))
        lost = np.column_stack((layers, experts, self.lost[layers, experts]))
        return CapacitySnapshot(reason, lost.tolist(), self.num_over, self.mass_lost, self.tokens)

    def untouched(self, table: SequenceTable, rows: Int32Array, top_k: int) -> None:
        """Tokens of the sequences `rows` [n] have passed a layer with all their pairs."""
        self.tokens += len(rows)
        np.add.at(table.usage[:, UsageColumn.PAIRS], rows, top_k)
        np.add.at(table.usage[:, UsageColumn.TOKENS], rows, 1)

    def touched(
        self,
        layer: int,
        table: SequenceTable,
        rows: Int32Array,
        batch: RoutedBatch,
        selection: Selection,
        mass_lost: FloatArray,
        *,
        again: bool = False,
    ) -> None:
        """A selection has been made for tokens of the sequences `rows` [n]; `mass_lost` [n] of each token.

        Of a token's lost pairs the best count as those that were rerouted.

        Args:
            again: the tokens were counted when they passed this layer for the first time.
        """
        self.num_over += selection.num_over
        self.mass_lost += float(mass_lost.sum())
        self.tokens += 0 if again else len(rows)
        rank = np.cumsum(selection.lost, axis=1)
        rerouted = selection.lost & (rank <= selection.num_rerouted[:, None])
        for column, pairs in enumerate((selection.lost & ~rerouted, rerouted)):
            np.add.at(self.lost[layer, :, column], batch.topk_ids[pairs], 1)
        columns = np.empty((len(rows), NUM_USAGE_COLUMNS))
        columns[:, UsageColumn.PAIRS] = 0 if again else batch.is_pair.sum(axis=1)
        columns[:, UsageColumn.DROPPED] = selection.num_dropped
        columns[:, UsageColumn.REROUTED] = selection.num_rerouted
        columns[:, UsageColumn.MASS_LOST] = mass_lost
        columns[:, UsageColumn.TOKENS] = 0 if again else 1
        np.add.at(table.usage, rows, columns)

"""What kernels would say, drawn at random: experts from a routing model, tokens that mean nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from amoe.core.batcher import Batcher
from amoe.core.steps import AttentionStep, ForwardStep, HeadStep
from amoe.profiles.routing import RoutingModel, scores_of
from amoe.sim.worker import Routing
from amoe.types import BoolArray, Float32Array, Int64Array

OnTokens = Callable[[npt.NDArray[np.int64], BoolArray, float], None]


class ModelledAnswers:
    """Answers of one attention worker. A sequence ends at its `max_tokens`.

    Args:
        with_scores: make up the router's scores of all experts too, for capacity.
        on_tokens: called with the request_ids [n] that get a token, which of them end [n], and the time.
    """

    def __init__(
        self,
        batcher: Batcher,
        routing: RoutingModel,
        rng: np.random.Generator,
        *,
        sparse_layers: Sequence[bool],
        top_k: int,
        on_tokens: OnTokens,
        with_scores: bool = False,
    ) -> None:
        self._batcher = batcher
        self._routing = routing
        self._rng = rng
        self._sparse = tuple(sparse_layers)
        self._on_tokens = on_tokens
        self._with_scores = with_scores
        num_rows = len(batcher.table.sequences)
        self._request_id: Int64Array = np.zeros(num_rows, np.int64)
        self._max_tokens: Int64Array = np.zeros(num_rows, np.int64)
        self._weights: Float32Array = np.full((batcher.slots.num_slots, top_k), 1.0 / top_k, np.float32)
        self._token_ids: Int64Array = np.zeros(num_rows, np.int64)

    def experts_of(self, step: ForwardStep) -> Mapping[int, Int64Array]:
        """Nobody wants to know them."""
        return {}

    def route(self, step: AttentionStep, now: float) -> Routing | None:
        """Experts by the routing model, of equal weight."""
        layer = step.block.layer
        if not self._sparse[layer]:
            return None
        count = step.num_tokens
        topk_ids = self._routing.draw(self._rng, layer, count, now)
        scores = None
        if self._with_scores:
            scores = scores_of(self._rng, topk_ids, self._routing.popularity(now)[layer])
        return Routing(topk_ids, self._weights[:count], scores)

    def sample(self, step: HeadStep, now: float) -> tuple[Int64Array, BoolArray]:
        """Token 0 for everybody."""
        for sequence in self._batcher.take_admitted():
            if sequence.row >= 0:
                self._request_id[sequence.row] = sequence.request_id
                self._max_tokens[sequence.row] = sequence.params.max_tokens
        table, rows = self._batcher.table, step.rows
        num_generated = table.num_tokens[rows] - table.prompt_len[rows] + 1
        finished: BoolArray = num_generated >= self._max_tokens[rows]
        if len(rows):
            self._on_tokens(self._request_id[rows], finished, now)
        return self._token_ids[: len(rows)], finished

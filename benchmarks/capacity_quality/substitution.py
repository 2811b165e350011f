"""Why weights matter: how far one layer's expert output moves if every token loses a pair, by what stands in for it.

Nothing else changes: all layers get the exact residuals. For a model with top-2.
"""

from __future__ import annotations

import numpy as np
import torch

from amoe.models.model import Model
from amoe.models.outputs import AttentionOutput
from amoe.types import Float32Array, Int64Array
from benchmarks.capacity_quality.capping import Batching
from benchmarks.capacity_quality.forward import Forward, Rows
from benchmarks.capacity_quality.task import Row


class Substitution:
    """Looks at every layer of a dropless pass. y = w1 f1 + w2 f2; f3 is the output of the third-best expert."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.rows: list[Row] = []

    def __call__(self, layer: int, rows: Rows, out: AttentionOutput) -> tuple[Int64Array, Float32Array]:
        """What `Forward.step` computes."""
        assert out.moe_input is not None and out.scores is not None
        assert out.topk_ids is not None and out.topk_weights is not None
        scores, best = out.scores.topk(3, dim=1)
        ones = torch.ones((len(best), 1))
        outputs = [
            self._model.experts(layer, out.moe_input, best[:, rank : rank + 1], ones).float() for rank in range(3)
        ]
        self.rows.append({"layer": layer, **_errors(outputs, scores), **_likeness(outputs)})
        return out.topk_ids.numpy(), out.topk_weights.numpy()


def substitution(model: Model, text: torch.Tensor, batching: Batching) -> list[Row]:
    """A row per layer: squared errors over the squared norm of the exact output, over all tokens of the prompts."""
    looking = Substitution(model)
    flat = np.arange(len(text) * batching.prompt)
    rows = Rows(flat // batching.prompt, flat % batching.prompt, True, 0)
    with torch.inference_mode():
        Forward(model, len(text), text.shape[1]).step(text[:, : batching.prompt].reshape(-1), rows, looking)
    return [{name: round(value, 4) for name, value in row.items()} for row in looking.rows]


def _errors(outputs: list[torch.Tensor], scores: torch.Tensor) -> dict[str, float]:
    (first, second, third), (s1, s2, s3) = outputs, scores.unsqueeze(2).unbind(1)
    mass = s1 + s2
    exact = (s1 * first + s2 * second) / mass
    ways = {
        "second lost, renormalised": first,
        "second lost, missing": s1 * first / mass,
        "second rerouted to the third, renormalised": (s1 * first + s3 * third) / (s1 + s3),
        "best lost, renormalised": second,
        "best lost, missing": s2 * second / mass,
        "best rerouted to the third, renormalised": (s2 * second + s3 * third) / (s2 + s3),
        "both lost": torch.zeros_like(exact),
    }
    norm = exact.square().sum()
    return {name: float((output - exact).square().sum() / norm) for name, output in ways.items()}


def _likeness(outputs: list[torch.Tensor]) -> dict[str, float]:
    first, second, third = outputs
    similarity = torch.nn.functional.cosine_similarity
    return {
        "cosine of best and second": float(similarity(first, second).mean()),
        "cosine of second and third": float(similarity(second, third).mean()),
        "norm of second over best": float((second.norm(dim=1) / first.norm(dim=1)).mean()),
    }

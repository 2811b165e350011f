"""All layers of a model one after the other, for a worker that holds it whole and has no single call for them.

Shape letters: as in `model.py`; w tokens that the head wants to see, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from amoe.kernels.attention import AttentionBatch
from amoe.models.outputs import AttentionOutput, Passed
from amoe.models.worker_model import WorkerModel


def pass_layers(
    model: WorkerModel,
    residual: torch.Tensor,
    positions: torch.Tensor,
    kv: Any,
    batch: AttentionBatch,
    wanted: torch.Tensor | None,
    now: Callable[[], float],
) -> Passed:
    """See `Model.forward`; block by block."""
    num_layers = model.config.num_layers
    expert_ids: dict[int, npt.NDArray[np.int64]] = {}
    marks = [now()]
    for layer in range(num_layers):
        out = model.attention(layer, residual, positions, kv, batch)
        marks.append(now())
        if layer == num_layers - 1 and wanted is not None:
            out = _rows(out, wanted)
        residual, ids = _experts(model, layer, out)
        marks.append(now())
        if ids is not None:
            expert_ids[layer] = ids
    return Passed(residual, expert_ids, np.diff(marks).reshape(num_layers, 2))


def _experts(model: WorkerModel, layer: int, out: AttentionOutput) -> tuple[torch.Tensor, npt.NDArray[np.int64] | None]:
    """Residuals [n, H] behind a layer, and the experts [n, K] of its tokens; none at a dense layer."""
    if out.topk_ids is None or out.topk_weights is None or out.moe_input is None:
        return out.residual, None
    ids = out.topk_ids.cpu().numpy()
    if len(ids) == 0:
        return out.residual, ids
    return model.experts(layer, out.moe_input, out.topk_ids, out.topk_weights, residual=out.residual), ids


def _rows(out: AttentionOutput, rows: torch.Tensor) -> AttentionOutput:
    """Those rows of everything."""
    residual, *others = out
    return AttentionOutput(residual.index_select(0, rows), *(_rows_of(tensor, rows) for tensor in others))


def _rows_of(tensor: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor | None:
    return None if tensor is None else tensor.index_select(0, rows)

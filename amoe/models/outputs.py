"""What the blocks of a model give, whichever kernels compute them.

Shape letters: as in `model.py`; w tokens that the head wants to see, L layers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch


class AttentionOutput(NamedTuple):
    """What an attention block gives.

    Attributes:
        residual: [n, H], with the shared expert's output (MoE layer) or the MLP's (dense layer) in it.
        moe_input: [n, H]; None for a dense layer, as are the next three.
        topk_ids: [n, K] int64, best first.
        topk_weights: [n, K] float32.
        scores: [n, num_experts] float32, softmax over all experts.
    """

    residual: torch.Tensor
    moe_input: torch.Tensor | None
    topk_ids: torch.Tensor | None
    topk_weights: torch.Tensor | None
    scores: torch.Tensor | None


class Passed(NamedTuple):
    """What all layers together give.

    Attributes:
        residual: [w, H] behind the last layer.
        expert_ids: by layer, of those that have experts, [n, K]; of the last layer [w, K]. On the host.
        seconds: [L, 2] that the attention and the experts of each layer have taken.
    """

    residual: torch.Tensor
    expert_ids: dict[int, npt.NDArray[np.int64]]
    seconds: npt.NDArray[np.float64]

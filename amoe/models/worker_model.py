"""What a worker asks of its model, whichever kernels compute it.

Shape letters: as in `model.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from amoe.kernels.attention import AttentionBatch
from amoe.models.config import ModelConfig
from amoe.models.outputs import AttentionOutput, Passed


class PagedCache(Protocol):
    """The KV cache of one attention worker, in the layout of its model."""

    num_blocks: int
    block_size: int


class WorkerModel(Protocol):
    """The blocks of one worker. `Model` says what the methods do."""

    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    parameter_bytes: int

    @property
    def sum_dtype(self) -> torch.dtype:
        """Of what `experts` gives without a residual: float32 where it then matters little, or not at all, which
        workers hold which experts; the model's own where the kernels round by the batch anyway."""
        ...

    @property
    def held_experts(self) -> dict[int, tuple[int, ...]]: ...

    @property
    def progress(self) -> int:
        """Goes up with every layer that `forward` takes tokens through. Any thread may ask, also inside a step."""
        ...

    def set_experts(self, layer: int, experts: Any) -> None: ...

    def discard_experts(self, layer: int) -> None:
        """What has been loaded for `set_experts` of this layer will not be set after all."""
        ...

    def new_kv_cache(self, num_blocks: int, block_size: int, max_len: int | None = None) -> Any: ...

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor: ...

    def attention(
        self, layer: int, residual: torch.Tensor, positions: torch.Tensor, kv: Any, batch: AttentionBatch
    ) -> AttentionOutput: ...

    def experts(
        self,
        layer: int,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        expert_weights: torch.Tensor,
        rows: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor: ...

    def forward(
        self,
        residual: torch.Tensor,
        positions: torch.Tensor,
        kv: Any,
        batch: AttentionBatch,
        wanted: torch.Tensor | None,
        now: Callable[[], float],
    ) -> Passed: ...

    def head(self, residual: torch.Tensor) -> torch.Tensor: ...

    def argmax(self, logits: torch.Tensor) -> npt.NDArray[np.int64]: ...

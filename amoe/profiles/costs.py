"""What a block costs on a device: the time that the simulator lets pass, and that an emulated device waits.

The roofline of a kernel is the longer of computing and reading. A block is a sequence of kernels, and the grouped GEMM
counts as one kernel per expert: an expert with few tokens is bound by reading its weights, one with many by computing.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from amoe.profiles.devices import DeviceProfile
from amoe.profiles.models import ModelSizes

FloatArray = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64] | npt.NDArray[np.int32] | FloatArray


class BlockCosts(Protocol):
    """Seconds of device time per block; everything is zero for a block without tokens."""

    def attention(self, layer: int, num_tokens: int, num_context: int) -> float:
        """attention(layer) on `num_tokens` tokens that look at `num_context` (query, context) pairs together."""
        ...

    def experts(self, layer: int, counts: Counts) -> FloatArray:
        """experts(layer), vectorised: `counts` [..., E] pairs of each expert held; returns [...]."""
        ...

    def head(self, num_tokens: int) -> float:
        """The head and the sampler."""
        ...


class RooflineCosts:
    """`BlockCosts` from data sheets."""

    def __init__(self, sizes: ModelSizes, device: DeviceProfile) -> None:
        self.sizes = sizes
        self.device = device

    def attention(self, layer: int, num_tokens: int, num_context: int) -> float:
        """Projections and router (and shared experts, or the dense MLP), then attention proper."""
        if num_tokens == 0:
            return 0.0
        sizes, device = self.sizes, self.device
        params = sizes.block_params(layer)
        linear = max(2 * params * num_tokens / device.flops, params * sizes.weight_bytes / device.bandwidth)
        mixing = max(
            sizes.attention_flops * num_context / device.flops, sizes.kv_bytes * num_context / device.bandwidth
        )
        return device.launch_s + linear + mixing

    def experts(self, layer: int, counts: Counts) -> FloatArray:
        """One roofline per expert that has tokens."""
        sizes, device = self.sizes, self.device
        reading = sizes.expert_bytes / device.bandwidth
        per_pair = 2 * sizes.expert_params / device.flops
        times = np.where(counts > 0, np.maximum(counts * per_pair, reading), 0.0).sum(axis=-1)
        return np.where(times > 0, times + device.launch_s, 0.0)

    def head(self, num_tokens: int) -> float:
        """Final norm, LM head, sampler."""
        if num_tokens == 0:
            return 0.0
        params = self.sizes.vocab_size * self.sizes.hidden_size
        device = self.device
        linear = max(2 * params * num_tokens / device.flops, params * self.sizes.weight_bytes / device.bandwidth)
        return device.launch_s + device.sampling_s + linear

"""Load a worker's blocks for the native kernels: a matrix is read, packed and forgotten before the next is read."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from amoe.kernels.native import _native
from amoe.kernels.native.packing import PackedExperts, PackedMatrix
from amoe.models.checkpoint import Checkpoint
from amoe.models.config import ModelConfig
from amoe.models.layers import MlpWeights
from amoe.models.model import Blocks
from amoe.models.native_model import NativeAttention, NativeHead, NativeModel, NativeWeights
from amoe.models.weights_builder import WeightsBuilder

_META = torch.device("meta")


def load_native_model(
    path: str | Path,
    config: ModelConfig,
    blocks: Blocks,
    context: _native.Context,
    *,
    dtype: torch.dtype,
    quantize: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> NativeModel:
    """As `loader.load_model`, for `context`. Peak memory: the final size, and one matrix or one expert.

    Args:
        quantize: experts, projections and the LM head become int8; embedding, routers and norms stay as they are.

    Raises:
        CheckpointError: as `load_model`.
    """
    packer = _Packer(Checkpoint(path), config, dtype, quantize, on_progress)
    packer.check(blocks)
    weights = NativeWeights()
    if blocks.attention:
        weights.head = packer.head()
        weights.attention = [packer.attention(layer) for layer in range(config.num_layers)]
    for layer, ids in sorted(blocks.experts.items()):
        if ids:
            weights.experts[layer] = packer.experts(layer, ids)
    return NativeModel(
        config, blocks, weights, context, dtype=dtype, parameter_bytes=packer.num_bytes, is_quantized=quantize
    )


def load_native_experts(
    path: str | Path,
    config: ModelConfig,
    layer: int,
    ids: tuple[int, ...],
    *,
    dtype: torch.dtype,
    quantize: bool = False,
    held: PackedExperts | None = None,
) -> PackedExperts:
    """As `loader.load_experts`, but in the memory of those that are `held`, which stay where they are: a model may
    compute with them meanwhile.

    Raises:
        CheckpointError: as `load_model`.
    """
    checkpoint = Checkpoint(path)
    WeightsBuilder(checkpoint, config, dtype, _META).experts(layer, ids, frozenset(() if held is None else held.ids))
    try:
        return _Packer(checkpoint, config, dtype, quantize, None).experts(layer, ids, held)
    except BaseException:
        if held is not None:
            held.forget_others()
        raise


class _Packer:
    """Reads and packs block after block.

    Attributes:
        num_bytes: of what has been packed.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        dtype: torch.dtype,
        quantize: bool,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        self.num_bytes = 0
        self._checkpoint = checkpoint
        self._config = config
        self._dtype = dtype
        self._quantize = quantize
        self._on_progress = on_progress
        self._done = self._total = 0

    def check(self, blocks: Blocks) -> None:
        """Everything that `blocks` need is there; reads headers only."""
        builder = WeightsBuilder(self._checkpoint, self._config, self._dtype, _META)
        builder.build(blocks)
        self._total = builder.total_bytes

    def _builder(self) -> WeightsBuilder:
        return WeightsBuilder(self._checkpoint, self._config, self._dtype, torch.device("cpu"))

    def _read(self, builder: WeightsBuilder) -> None:
        builder.fill(None)
        self._report(builder.total_bytes)

    def _report(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._on_progress is not None:
            self._on_progress(self._done, self._total)

    def _matrix(self, weight: torch.Tensor, *, quantize: bool = False) -> PackedMatrix:
        packed = PackedMatrix.of(weight, quantize=quantize)
        self.num_bytes += packed.nbytes
        return packed

    def _mlp(self, weights: MlpWeights) -> PackedExperts:
        hidden, size = weights.down.shape
        packed = PackedExperts.empty((0,), hidden, size, self._dtype, quantize=self._quantize)
        packed.put(0, weights.gate_up, weights.down)
        self.num_bytes += packed.num_bytes
        return packed

    def _kept(self, *tensors: torch.Tensor | None) -> None:
        self.num_bytes += sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def head(self) -> NativeHead:
        builder = self._builder()
        head = builder.head()
        self._read(builder)
        self._kept(head.embedding, head.norm)
        return NativeHead(head.embedding, head.norm, self._matrix(head.lm_head, quantize=self._quantize))

    def attention(self, layer: int) -> NativeAttention:
        builder = self._builder()
        weights = builder.attention(layer)
        self._read(builder)
        self._kept(weights.input_norm, weights.post_norm, weights.qkv_bias, weights.q_norm, weights.k_norm)
        self._kept(weights.shared_gate)
        return NativeAttention(
            input_norm=weights.input_norm,
            qkv=self._matrix(weights.qkv, quantize=self._quantize),
            qkv_bias=weights.qkv_bias,
            q_norm=weights.q_norm,
            k_norm=weights.k_norm,
            out=self._matrix(weights.out, quantize=self._quantize),
            post_norm=weights.post_norm,
            router=None if weights.router is None else self._matrix(weights.router),
            shared=None if weights.shared is None else self._mlp(weights.shared),
            shared_gate=weights.shared_gate,
            mlp=None if weights.mlp is None else self._mlp(weights.mlp),
        )

    def experts(self, layer: int, ids: tuple[int, ...], held: PackedExperts | None = None) -> PackedExperts:
        """Experts of a layer, with room for all there are; those of `held` stay where they are."""
        config = self._config
        if held is None:
            sizes = (config.hidden_size, config.moe_intermediate_size, self._dtype)
            packed = PackedExperts.empty(ids, *sizes, quantize=self._quantize, room=config.num_experts)
        else:
            packed = held.holding(ids)
        here = frozenset(() if held is None else held.ids)
        new = [at for at in zip(packed.ids, packed.places, strict=True) if at[0] not in here]

        def fill(at: tuple[int, int]) -> int:
            """Returns the bytes of the checkpoint that have been read."""
            expert, place = at
            builder = self._builder()
            weights = builder.experts(layer, (expert,))
            builder.fill(None)
            packed.put(place, weights.w13[0], weights.w2[0])
            return builder.total_bytes

        with ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="amoe-pack") as threads:
            for num_bytes in threads.map(fill, new):
                self._report(num_bytes)
        self.num_bytes += packed.num_bytes
        return packed

"""`Model` on the native kernels: the same blocks with packed weights, one native call for each.

Shape letters: as in `model.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from amoe.kernels.attention import AttentionBatch
from amoe.kernels.native import _native
from amoe.kernels.native.kv_cache import NativeBatch, NativeKVCache
from amoe.kernels.native.memory import empty
from amoe.kernels.native.packing import PackedExperts, PackedMatrix
from amoe.models.config import ModelConfig
from amoe.models.layers import rope_frequencies
from amoe.models.model import Blocks
from amoe.models.outputs import AttentionOutput, Passed

_QK_NORMS = {"none": 0, "head": 1, "full": 2}


@dataclass(frozen=True, kw_only=True)
class NativeAttention:
    """The weights of one attention block; see `AttentionWeights`.

    Attributes:
        shared, mlp: the shared expert of an MoE layer, the MLP of a dense one.
    """

    input_norm: torch.Tensor
    qkv: PackedMatrix
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    out: PackedMatrix
    post_norm: torch.Tensor
    router: PackedMatrix | None
    shared: PackedExperts | None
    shared_gate: torch.Tensor | None
    mlp: PackedExperts | None


@dataclass(frozen=True)
class NativeHead:
    """embedding [V, H], final norm [H], LM head [V, H]."""

    embedding: torch.Tensor
    norm: torch.Tensor
    lm_head: PackedMatrix


@dataclass(slots=True)
class NativeWeights:
    """All weights of one worker; see `Weights`."""

    head: NativeHead | None = None
    attention: list[NativeAttention] = field(default_factory=list)
    experts: dict[int, PackedExperts] = field(default_factory=dict)


class NativeModel:
    """The blocks of one worker on a CPU. `load_model` makes it. One caller at a time."""

    def __init__(
        self,
        config: ModelConfig,
        blocks: Blocks,
        weights: NativeWeights,
        context: _native.Context,
        *,
        dtype: torch.dtype,
        parameter_bytes: int,
        is_quantized: bool = False,
    ) -> None:
        self.config = config
        self.blocks = blocks
        self.weights = weights
        self.dtype = dtype
        self.device = torch.device("cpu")
        self.parameter_bytes = parameter_bytes
        self.is_quantized = is_quantized
        self._context = context
        self._rope = torch.empty(0, 2, config.head_dim // 2)
        self._logits = torch.empty(0)
        self._layers: list[_native.AttentionLayer] = []
        self._blocks_of_layers: list[_native.LayerBlocks] | None = None
        self._local_index: dict[int, torch.Tensor] = {}
        for layer in weights.experts:
            self._index(layer)

    @property
    def progress(self) -> int:
        """See `WorkerModel`."""
        return self._context.progress

    @property
    def sum_dtype(self) -> torch.dtype:
        """See `WorkerModel`. Sums of weighted outputs are exact in float32, or nearly: see `src/experts.h`."""
        return torch.float32

    # ---- experts that come and go

    @property
    def held_experts(self) -> dict[int, tuple[int, ...]]:
        """Global ids of the experts here, by layer."""
        return {layer: experts.ids for layer, experts in self.weights.experts.items()}

    def set_experts(self, layer: int, experts: PackedExperts) -> None:
        """Hold these experts of a layer from now on, in place of those that were here; none is fine."""
        before = self.weights.experts.pop(layer, None)
        self.parameter_bytes += experts.num_bytes - (0 if before is None else before.num_bytes)
        self._blocks_of_layers = None
        if experts.ids:
            self.weights.experts[layer] = experts
            self._index(layer)
            experts.forget_others()

    def discard_experts(self, layer: int) -> None:
        """See `WorkerModel`. They lie beside those that are here."""
        if layer in self.weights.experts:
            self.weights.experts[layer].forget_others()

    def _index(self, layer: int) -> None:
        """Note the place of each global expert of a layer, -1 if it is not here."""
        experts = self.weights.experts[layer]
        index = torch.full((self.config.num_experts,), -1, dtype=torch.int64)
        index[list(experts.ids)] = torch.tensor(experts.places)
        self._local_index[layer] = index

    # ---- blocks

    def new_kv_cache(self, num_blocks: int, block_size: int, max_len: int | None = None) -> NativeKVCache:
        """See `Model.new_kv_cache`."""
        config = self.config
        self._rope = _rope_table(config, max_len or config.max_position_embeddings)
        kv_heads, head_dim = config.num_key_value_heads, config.head_dim
        cache = NativeKVCache.of(config.num_layers, num_blocks, block_size, kv_heads, head_dim, self.dtype)
        shape = _native.AttentionShape(
            config.num_attention_heads,
            kv_heads,
            head_dim,
            block_size,
            _QK_NORMS[config.qk_norm],
            config.rms_norm_eps,
            config.clip_qkv or 0.0,
            head_dim**-0.5,
        )
        self._layers = [self._handle(shape, weights) for weights in self.weights.attention]
        self._blocks_of_layers = None
        return cache

    def _handle(self, shape: _native.AttentionShape, weights: NativeAttention) -> _native.AttentionLayer:
        config, mlp = self.config, weights.mlp or weights.shared
        return _native.AttentionLayer(
            shape,
            config.rms_norm_eps,
            _address(weights.input_norm, self.dtype),
            _address(weights.post_norm, self.dtype),
            _address(weights.qkv_bias, self.dtype),
            _address(weights.q_norm, self.dtype),
            _address(weights.k_norm, self.dtype),
            _address(self._rope, torch.float32),
            weights.qkv.handle,
            weights.out.handle,
            None if weights.router is None else weights.router.handle,
            config.top_k,
            config.norm_topk_prob,
            config.round_topk_weights,
            None if mlp is None else mlp.handle,
            _address(weights.shared_gate, self.dtype),
        )

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """See `Model.embed`."""
        assert self.weights.head is not None, "this worker holds no attention blocks"
        return F.embedding(token_ids, self.weights.head.embedding)

    def attention(
        self, layer: int, residual: torch.Tensor, positions: torch.Tensor, kv: NativeKVCache, batch: AttentionBatch
    ) -> AttentionOutput:
        """See `Model.attention`. `kv` is the last one that `new_kv_cache` has made."""
        config, weights, n = self.config, self.weights.attention[layer], len(residual)
        out, normed = torch.empty_like(residual), torch.empty_like(residual)
        sparse = weights.router is not None
        ids = torch.empty((n, config.top_k), dtype=torch.int64)
        topk_weights = torch.empty((n, config.top_k))
        scores = torch.empty((n, config.num_experts)) if sparse else None
        self._context.attention(
            self._layers[layer],
            self._prepared(batch, positions, kv).handle,
            _address(residual, self.dtype),
            n,
            _address(positions, torch.int64),
            _address(batch.slot_mapping, torch.int64),
            kv.layers[layer].data_ptr(),
            out.data_ptr(),
            normed.data_ptr(),
            ids.data_ptr(),
            topk_weights.data_ptr(),
            _address(scores, torch.float32),
        )
        if not sparse:
            return AttentionOutput(out, None, None, None, None)
        return AttentionOutput(out, normed, ids, topk_weights, scores)

    def experts(
        self,
        layer: int,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        expert_weights: torch.Tensor,
        rows: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Model.experts`."""
        expert_ids = expert_ids.to(torch.int64).contiguous()
        expert_weights = expert_weights.to(torch.float32).contiguous()
        n, top_k = expert_ids.shape
        out = hidden.new_empty((n, hidden.shape[1]), dtype=self.sum_dtype if residual is None else self.dtype)
        self._context.experts(
            self.weights.experts[layer].handle,
            _address(hidden, self.dtype),
            _address(rows, torch.int64),
            n,
            expert_ids.data_ptr(),
            expert_weights.data_ptr(),
            top_k,
            self._local_index[layer].data_ptr(),
            _address(residual, self.dtype),
            out.data_ptr(),
        )
        return out

    def forward(
        self,
        residual: torch.Tensor,
        positions: torch.Tensor,
        kv: NativeKVCache,
        batch: AttentionBatch,
        wanted: torch.Tensor | None,
        now: Callable[[], float],
    ) -> Passed:
        """See `Model.forward`. One native call, which brings its own clock; `residual` is overwritten."""
        config, n = self.config, len(residual)
        out = residual.new_empty((n if wanted is None else len(wanted), config.hidden_size))
        ids = np.empty((config.num_layers, n, config.top_k), np.int64)
        seconds = np.empty((config.num_layers, 2))
        self._context.forward(
            self._whole_layers(kv),
            self._prepared(batch, positions, kv).handle,
            _address(residual, self.dtype),
            n,
            _address(positions, torch.int64),
            _address(batch.slot_mapping, torch.int64),
            _address(wanted, torch.int64),
            len(out),
            out.data_ptr(),
            ids.ctypes.data,
            seconds.ctypes.data,
        )
        last = ids[-1].reshape(-1)[: out.shape[0] * config.top_k].reshape(len(out), config.top_k)
        return Passed(out, {layer: ids[layer] for layer in self.weights.experts} | self._last(last), seconds)

    def _last(self, ids: npt.NDArray[np.int64]) -> dict[int, npt.NDArray[np.int64]]:
        last = self.config.num_layers - 1
        return {last: ids} if last in self.weights.experts else {}

    def _whole_layers(self, kv: NativeKVCache) -> list[_native.LayerBlocks]:
        """All layers, made anew whenever experts or the cache have changed."""
        if self._blocks_of_layers is None:
            self._blocks_of_layers = [
                _native.LayerBlocks(
                    attention,
                    self.weights.experts[layer].handle if layer in self.weights.experts else None,
                    _address(self._local_index.get(layer), torch.int64),
                    kv.layers[layer].data_ptr(),
                )
                for layer, attention in enumerate(self._layers)
            ]
        return self._blocks_of_layers

    def head(self, residual: torch.Tensor) -> torch.Tensor:
        """See `Model.head`. The logits are valid until the next head: all heads write to the same memory."""
        head = self.weights.head
        assert head is not None, "this worker holds no attention blocks"
        residual = residual.contiguous()
        n, hidden = residual.shape
        logits = self._room_for_logits(n, head.lm_head.rows)
        self._context.linear(
            _address(residual, self.dtype),
            hidden,
            n,
            _address(head.norm, self.dtype),
            self.config.rms_norm_eps,
            head.lm_head.handle,
            0,
            0,
            logits.data_ptr(),
            head.lm_head.rows,
            True,
        )
        return logits

    def _room_for_logits(self, n: int, vocab_size: int) -> torch.Tensor:
        """[n, V] in memory that is kept: fresh memory of this size would be mapped page by page in every step."""
        if n * vocab_size > len(self._logits):
            self._logits = empty((n * vocab_size,), torch.float32)
        return self._logits[: n * vocab_size].view(n, vocab_size)

    def argmax(self, logits: torch.Tensor) -> npt.NDArray[np.int64]:
        """See `Model.argmax`."""
        ids = np.empty(len(logits), np.int64)
        logits = logits.contiguous()
        n, vocab_size = logits.shape
        self._context.argmax(_address(logits, torch.float32), n, vocab_size, ids.ctypes.data)
        return ids

    def _prepared(self, batch: AttentionBatch, positions: torch.Tensor, kv: NativeKVCache) -> NativeBatch:
        """`batch` as the kernels take it, made and looked at once for all layers."""
        prepared = batch.prepared
        if not isinstance(prepared, NativeBatch):
            _require_below(positions, len(self._rope), "positions")
            _require_below(batch.slot_mapping, kv.num_blocks * kv.block_size, "slots")
            prepared = batch.prepared = NativeBatch(batch)
        return prepared


def _address(tensor: torch.Tensor | None, dtype: torch.dtype) -> int:
    """What the kernels take for a tensor; they ask no questions, and would read and write foreign memory."""
    if tensor is None:
        return 0
    assert tensor.dtype == dtype, f"{tensor.dtype} instead of {dtype}"
    assert tensor.is_contiguous(), f"strides {tensor.stride()} of {tuple(tensor.shape)}"
    return tensor.data_ptr()


def _require_below(values: torch.Tensor, limit: int, name: str) -> None:
    if len(values):
        low, high = (int(end) for end in values.aminmax())
        assert low >= 0 and high < limit, f"{name} from {low} to {high}, and there are {limit}"


def _rope_table(config: ModelConfig, max_len: int) -> torch.Tensor:
    """[max_len, 2, D / 2] float32: cosines, then sines, of each position."""
    positions = torch.arange(max_len, dtype=torch.float32)
    angles = positions.unsqueeze(1) * rope_frequencies(config.rope, config.head_dim)
    return torch.stack((angles.cos(), angles.sin()), dim=1) * config.rope.attention_factor

"""The blocks of a model that one worker holds, as functions of tensors: no queue, no sequence, no placement in sight.

`Model` computes with torch, on any device; `native_model.py` with kernels of our own, on a CPU.

Shape letters: n tokens, H hidden size, Hq and Hkv heads, D head size, K experts per token, E experts here, I their
intermediate size, V vocabulary. Run the methods under `torch.inference_mode()`: entering it per call costs time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from amoe.kernels.argmax import argmax_rows
from amoe.kernels.attention import AttentionBatch, KVCache, paged_attention
from amoe.kernels.grouped_gemm import ExpertViews, expert_views, grouped_experts
from amoe.kernels.permute import plan_pairs
from amoe.models.config import ModelConfig
from amoe.models.forward import pass_layers
from amoe.models.layers import MlpWeights, apply_rope, gated_mlp, rms_norm, rope_table, route
from amoe.models.outputs import AttentionOutput, Passed


@dataclass(frozen=True)
class Blocks:
    """What a worker holds.

    Attributes:
        attention: the attention blocks of all layers, with routers, shared experts and dense MLPs; embedding and head.
        experts: layer -> global ids of the experts held, ascending. Layers without experts here may be absent.
    """

    attention: bool
    experts: dict[int, tuple[int, ...]]

    @classmethod
    def whole(cls, config: ModelConfig) -> Blocks:
        """Every block of the model."""
        every = tuple(range(config.num_experts))
        return cls(True, {layer: every for layer, sparse in enumerate(config.sparse_layers) if sparse})


@dataclass(slots=True, kw_only=True)
class AttentionWeights:
    """One attention block.

    Attributes:
        qkv: [(Hq + 2 Hkv) D, H] rows of queries, keys, values; qkv_bias: [(Hq + 2 Hkv) D].
        q_norm, k_norm: [D] (per head) or [Hq D] and [Hkv D] (full width).
        out: [H, Hq D].
        router: [num_experts, H] of an MoE layer; shared and shared_gate [1, H]: its shared expert.
        mlp: of a dense layer.
    """

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    out: torch.Tensor
    post_norm: torch.Tensor
    router: torch.Tensor | None = None
    shared: MlpWeights | None = None
    shared_gate: torch.Tensor | None = None
    mlp: MlpWeights | None = None


@dataclass(slots=True)
class ExpertWeights:
    """The experts of one layer that are here.

    Attributes:
        ids: global ids, ascending.
        w13: [E, 2I, H] gate rows, then up rows.
        w2: [E, H, I].
    """

    ids: tuple[int, ...]
    w13: torch.Tensor
    w2: torch.Tensor

    @property
    def num_bytes(self) -> int:
        return self.w13.nbytes + self.w2.nbytes


@dataclass(slots=True)
class HeadWeights:
    """embedding [V, H], final norm [H], LM head [V, H] (the embedding itself where they are tied)."""

    embedding: torch.Tensor
    norm: torch.Tensor
    lm_head: torch.Tensor


@dataclass(slots=True)
class Weights:
    """All tensors of one worker."""

    head: HeadWeights | None = None
    attention: list[AttentionWeights] = field(default_factory=list)
    experts: dict[int, ExpertWeights] = field(default_factory=dict)


class Model:
    """The blocks of one worker. `load_model` makes it."""

    def __init__(
        self,
        config: ModelConfig,
        blocks: Blocks,
        weights: Weights,
        *,
        dtype: torch.dtype,
        device: torch.device,
        parameter_bytes: int,
    ) -> None:
        self.config = config
        self.blocks = blocks
        self.weights = weights
        self.dtype = dtype
        self.device = device
        self.parameter_bytes = parameter_bytes
        self.sum_dtype = dtype  # see `WorkerModel`
        self.progress = 0  # likewise
        self._scale = config.head_dim**-0.5
        self._views: dict[int, ExpertViews] = {
            layer: expert_views(experts.w13, experts.w2) for layer, experts in weights.experts.items()
        }
        self._local_index = {layer: self._index_of(layer) for layer in weights.experts}
        self._qk_norms = [_per_head_norm(config, layer) for layer in weights.attention]
        self._rope: torch.Tensor | None = None

    def _index_of(self, layer: int) -> npt.NDArray[np.int64]:
        """[num_experts] local index of each global expert of a layer, -1 if it is not here."""
        ids = self.weights.experts[layer].ids
        index = np.full(self.config.num_experts, -1, np.int64)
        index[list(ids)] = np.arange(len(ids))
        return index

    @property
    def held_experts(self) -> dict[int, tuple[int, ...]]:
        """Global ids of the experts here, by layer; layers without any may be absent."""
        return {layer: experts.ids for layer, experts in self.weights.experts.items()}

    def set_experts(self, layer: int, experts: ExpertWeights) -> None:
        """Hold these experts of a layer from now on, in place of those that were here; none is fine."""
        before = self.weights.experts.pop(layer, None)
        self._views.pop(layer, None)
        self.parameter_bytes += experts.num_bytes - (0 if before is None else before.num_bytes)
        if experts.ids:
            self.weights.experts[layer] = experts
            self._views[layer] = expert_views(experts.w13, experts.w2)
            self._local_index[layer] = self._index_of(layer)

    def discard_experts(self, layer: int) -> None:
        """See `WorkerModel`. They have memory of their own, which goes with them."""

    def new_kv_cache(self, num_blocks: int, block_size: int, max_len: int | None = None) -> KVCache:
        """A KV cache for `attention`, which takes the last one that was made.

        Args:
            max_len: of a sequence, in tokens: all positions are below it. None: as long as the model can tell apart.
        """
        config = self.config
        self._rope = rope_table(config, max_len or config.max_position_embeddings, self.dtype, self.device)
        return KVCache(
            config.num_layers,
            num_blocks,
            block_size,
            config.num_key_value_heads,
            config.head_dim,
            self.dtype,
            self.device,
        )

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[n] int64 token ids to [n, H] residuals."""
        assert self.weights.head is not None, "this worker holds no attention blocks"
        return F.embedding(token_ids, self.weights.head.embedding)

    def attention(
        self, layer: int, residual: torch.Tensor, positions: torch.Tensor, kv: KVCache, batch: AttentionBatch
    ) -> AttentionOutput:
        """Norm, attention, residual, norm, router; and the shared expert or the dense MLP, where the layer has one.

        Args:
            residual: [n, H]; not changed.
            positions: [n] int64, each token's position in its sequence.
            kv: the cache, written at `batch.slot_mapping`.
            batch: where the tokens stand.
        """
        self.progress += 1
        config, weights = self.config, self.weights.attention[layer]
        q, k, v = self._project(layer, rms_norm(residual, weights.input_norm, config.rms_norm_eps), positions)
        attended = paged_attention(q, k, v, kv, layer, batch, self._scale)
        residual = torch.addmm(residual, attended.view(len(residual), -1), weights.out.t())
        hidden = rms_norm(residual, weights.post_norm, config.rms_norm_eps)
        if weights.mlp is not None:
            return AttentionOutput(residual + gated_mlp(hidden, weights.mlp), None, None, None, None)
        assert weights.router is not None
        if weights.shared is not None and weights.shared_gate is not None:
            gate = torch.sigmoid(F.linear(hidden, weights.shared_gate))
            residual = torch.addcmul(residual, gate, gated_mlp(hidden, weights.shared))
        return AttentionOutput(residual, hidden, *route(hidden, weights.router, config))

    def _project(
        self, layer: int, x: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries [n, Hq, D] and keys [n, Hkv, D], and values [n, Hkv, D] of x [n, H]."""
        assert self._rope is not None
        config, weights = self.config, self.weights.attention[layer]
        qkv = F.linear(x, weights.qkv, weights.qkv_bias)
        heads = qkv.view(len(x), -1, config.head_dim)
        num_qk = config.num_attention_heads + config.num_key_value_heads
        qk, v = heads[:, :num_qk], heads[:, num_qk:]
        if config.qk_norm == "head":
            per_head = self._qk_norms[layer]
            assert per_head is not None
            qk = F.rms_norm(qk, (config.head_dim,), None, config.rms_norm_eps) * per_head
        elif config.qk_norm == "full":
            assert weights.q_norm is not None and weights.k_norm is not None
            q_flat, k_flat = qkv[:, : config.q_size], qkv[:, config.q_size : config.q_size + config.kv_size]
            q_flat = rms_norm(q_flat, weights.q_norm, config.rms_norm_eps)
            k_flat = rms_norm(k_flat, weights.k_norm, config.rms_norm_eps)
            qk = torch.cat((q_flat, k_flat), dim=1).view(len(x), num_qk, config.head_dim)
        if config.clip_qkv is not None:
            qk, v = qk.clamp(-config.clip_qkv, config.clip_qkv), v.clamp(-config.clip_qkv, config.clip_qkv)
        qk = apply_rope(qk, self._rope.index_select(0, positions))
        return qk[:, : config.num_attention_heads], qk[:, config.num_attention_heads :], v

    def experts(
        self,
        layer: int,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        expert_weights: torch.Tensor,
        rows: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Weighted sum over this worker's experts of each token's MoE input.

        Args:
            hidden: [m, H] MoE inputs.
            expert_ids: [n, K] global ids, int16 or int64, -1 for none. Those that are not here are passed over.
            expert_weights: [n, K] float32.
            rows: [n] int64 rows of `hidden` that the tokens are; None: all of them, in order.
            residual: [n, H] to be added; None: nothing.

        Returns:
            [n, H] in the model's dtype, or in `sum_dtype` without a residual; the pairs are summed in float32 in the
            order of a token's k.
        """
        weights = self.weights.experts[layer]
        plan = plan_pairs(expert_ids.cpu().numpy(), expert_weights.cpu().numpy(), self._local_index[layer])
        if rows is not None:
            hidden = hidden.index_select(0, rows)
        summed = grouped_experts(hidden, plan, weights.w13, weights.w2, self._views[layer])
        return summed if residual is None else residual + summed

    def forward(
        self,
        residual: torch.Tensor,
        positions: torch.Tensor,
        kv: KVCache,
        batch: AttentionBatch,
        wanted: torch.Tensor | None,
        now: Callable[[], float],
    ) -> Passed:
        """Take tokens through all layers, where this worker holds the model whole.

        Args:
            residual: [n, H] embedded tokens; may be overwritten.
            positions: [n] int64.
            kv: the cache, written at `batch.slot_mapping`.
            wanted: [w] int64 ascending rows that the head wants to see: only they need the last layer's experts; None:
                all.
            now: a clock in seconds.
        """
        return pass_layers(self, residual, positions, kv, batch, wanted, now)

    def head(self, residual: torch.Tensor) -> torch.Tensor:
        """[n, H] residuals after the last layer to [n, V] logits in float32, which the caller may change."""
        assert self.weights.head is not None, "this worker holds no attention blocks"
        hidden = rms_norm(residual, self.weights.head.norm, self.config.rms_norm_eps)
        return F.linear(hidden, self.weights.head.lm_head).float()

    def argmax(self, logits: torch.Tensor) -> npt.NDArray[np.int64]:
        """[n] ids of the greatest of logits [n, V], the lowest id where they tie."""
        return argmax_rows(logits)


def _per_head_norm(config: ModelConfig, weights: AttentionWeights) -> torch.Tensor | None:
    """[Hq + Hkv, D]: norm weights of all query and key heads, so that one call normalises both."""
    if config.qk_norm != "head":
        return None
    assert weights.q_norm is not None and weights.k_norm is not None
    return torch.cat(
        (
            weights.q_norm.expand(config.num_attention_heads, -1),
            weights.k_norm.expand(config.num_key_value_heads, -1),
        )
    )

"""Allocates the tensors of a worker and reads them from a checkpoint: first all names and shapes, then the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from amoe.models.architecture import Architecture
from amoe.models.checkpoint import Checkpoint
from amoe.models.config import ModelConfig
from amoe.models.layers import MlpWeights
from amoe.models.model import AttentionWeights, Blocks, ExpertWeights, HeadWeights, Weights
from amoe.models.registry import ARCHITECTURES


@dataclass(slots=True)
class _Read:
    """One tensor to read, or one row of a fused one, and where to put it."""

    name: str
    row: int | None
    destination: torch.Tensor
    num_bytes: int


class WeightsBuilder:
    """Allocates the tensors of a worker and notes what to read into them."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.architecture: Architecture = ARCHITECTURES[config.architecture]
        self.dtype = dtype
        self.device = device
        self.reads: list[_Read] = []
        self.total_bytes = 0
        self.allocated_bytes = 0

    def build(self, blocks: Blocks) -> Weights:
        """Allocate and check. Nothing is read yet."""
        weights = Weights()
        if blocks.attention:
            weights.head = self.head()
            weights.attention = [self.attention(layer) for layer in range(self.config.num_layers)]
        for layer, ids in sorted(blocks.experts.items()):
            if ids:
                weights.experts[layer] = self.experts(layer, ids)
        return weights

    def fill(self, on_progress: Callable[[int, int], None] | None) -> None:
        """Read everything, file by file."""
        done = 0
        for read in sorted(self.reads, key=lambda read: str(self.checkpoint.file(read.name))):
            read.destination.copy_(self.checkpoint.read(read.name, read.row))
            done += read.num_bytes
            if on_progress is not None:
                on_progress(done, self.total_bytes)

    def _empty(self, *shape: int) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.allocated_bytes += tensor.nbytes
        return tensor

    def _want(self, name: str, destination: torch.Tensor, row: int | None = None, rows: int = 0) -> None:
        """Note that tensor `name`, or row `row` of its `rows`, belongs in `destination`."""
        shape = tuple(destination.shape)
        element_bytes = self.checkpoint.check(name, shape if row is None else (rows, *shape))
        num_bytes = destination.numel() * element_bytes
        self.total_bytes += num_bytes
        self.reads.append(_Read(name, row, destination, num_bytes))

    def _tensor(self, name: str, *shape: int) -> torch.Tensor:
        tensor = self._empty(*shape)
        self._want(name, tensor)
        return tensor

    def _stacked(self, names: list[str], rows: list[int], *rest: int) -> torch.Tensor:
        """Several tensors of `rows[i]` rows, one below the other."""
        stacked = self._empty(sum(rows), *rest)
        for name, part in zip(names, stacked.split(rows), strict=True):
            self._want(name, part)
        return stacked

    def head(self) -> HeadWeights:
        config = self.config
        embedding = self._tensor("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        norm = self._tensor("model.norm.weight", config.hidden_size)
        if config.tie_word_embeddings:
            return HeadWeights(embedding, norm, embedding)
        return HeadWeights(embedding, norm, self._tensor("lm_head.weight", config.vocab_size, config.hidden_size))

    def _mlp(self, prefix: str, size: int) -> MlpWeights:
        hidden = self.config.hidden_size
        names = [f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight"]
        return MlpWeights(
            self._stacked(names, [size, size], hidden), self._tensor(f"{prefix}.down_proj.weight", hidden, size)
        )

    def attention(self, layer: int) -> AttentionWeights:
        config, prefix = self.config, f"model.layers.{layer}"
        attention, hidden, sizes = f"{prefix}.self_attn", config.hidden_size, [config.q_size] + 2 * [config.kv_size]
        weights = AttentionWeights(
            input_norm=self._tensor(f"{prefix}.input_layernorm.weight", hidden),
            qkv=self._stacked([f"{attention}.{x}_proj.weight" for x in "qkv"], sizes, hidden),
            out=self._tensor(f"{attention}.o_proj.weight", hidden, config.q_size),
            post_norm=self._tensor(f"{prefix}.post_attention_layernorm.weight", hidden),
        )
        if config.qkv_bias:
            weights.qkv_bias = self._stacked([f"{attention}.{x}_proj.bias" for x in "qkv"], sizes)
        if config.qk_norm != "none":
            q_size, k_size = sizes[:2] if config.qk_norm == "full" else (config.head_dim, config.head_dim)
            weights.q_norm = self._tensor(f"{attention}.q_norm.weight", q_size)
            weights.k_norm = self._tensor(f"{attention}.k_norm.weight", k_size)
        if not config.sparse_layers[layer]:
            weights.mlp = self._mlp(f"{prefix}.mlp", config.intermediate_size)
            return weights
        module = self._moe_module(layer)
        weights.router = self._tensor(f"{module}.gate.weight", config.num_experts, hidden)
        if config.shared_expert_intermediate_size:
            weights.shared = self._mlp(f"{module}.shared_expert", config.shared_expert_intermediate_size)
            weights.shared_gate = self._tensor(f"{module}.shared_expert_gate.weight", 1, hidden)
        return weights

    def _moe_module(self, layer: int) -> str:
        """Prefix of the MoE block's tensors: the spelling whose router is there, else the usual one."""
        modules = [f"model.layers.{layer}.{module}" for module in self.architecture.moe_modules]
        return next((module for module in modules if f"{module}.gate.weight" in self.checkpoint), modules[0])

    def experts(self, layer: int, ids: tuple[int, ...], spared: frozenset[int] = frozenset()) -> ExpertWeights:
        """Allocate and check experts of a layer. Those that are `spared` are not read."""
        config, prefix = self.config, f"{self._moe_module(layer)}.experts"
        hidden, size = config.hidden_size, config.moe_intermediate_size
        weights = ExpertWeights(ids, self._empty(len(ids), 2 * size, hidden), self._empty(len(ids), hidden, size))
        fused = f"{prefix}.gate_up_proj" in self.checkpoint
        gate, up, down = self.architecture.expert_projections
        for local, expert in enumerate(ids):
            if expert in spared:
                continue
            if fused:
                self._want(f"{prefix}.gate_up_proj", weights.w13[local], expert, config.num_experts)
                self._want(f"{prefix}.down_proj", weights.w2[local], expert, config.num_experts)
            else:
                self._want(f"{prefix}.{expert}.{gate}.weight", weights.w13[local, :size])
                self._want(f"{prefix}.{expert}.{up}.weight", weights.w13[local, size:])
                self._want(f"{prefix}.{expert}.{down}.weight", weights.w2[local])
        return weights

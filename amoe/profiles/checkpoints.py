"""Sizes of a model that has a checkpoint, from what its configuration says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from amoe.errors import ConfigError
from amoe.profiles.models import ModelSizes, grouped_query_attention


class CheckpointConfig(Protocol):
    """What is asked of `amoe.models.config.ModelConfig`, which this layer does not know."""

    @property
    def architecture(self) -> str: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def sparse_layers(self) -> Sequence[bool]: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def moe_intermediate_size(self) -> int: ...
    @property
    def shared_expert_intermediate_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...


def checkpoint_sizes(config: CheckpointConfig) -> ModelSizes:
    """A checkpoint's sizes as the cost model sees them, 16 bits per weight.

    Raises:
        ConfigError: dense layers stand behind sparse ones, which the cost model does not know.
    """
    sparse = list(config.sparse_layers)
    num_dense = sparse.index(True) if True in sparse else config.num_layers
    if num_dense == config.num_layers or not all(sparse[num_dense:]):
        raise ConfigError(
            "the cost model only knows models whose dense layers come first, before at least one with experts: name "
            "another one, by model=NAME in --device where it is emulated"
        )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return ModelSizes(
        name=config.architecture,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_experts=config.num_experts,
        top_k=config.top_k,
        moe_intermediate_size=config.moe_intermediate_size,
        vocab_size=config.vocab_size,
        num_dense_layers=num_dense,
        dense_intermediate_size=config.intermediate_size,
        shared_intermediate_size=config.shared_expert_intermediate_size,
        **grouped_query_attention(config.hidden_size, heads, kv_heads, config.head_dim),
    )

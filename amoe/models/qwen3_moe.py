"""Qwen3-MoE: queries and keys are normalised over each head; layers may be dense."""

from __future__ import annotations

from typing import Any

from amoe.models.architecture import Architecture, common_fields, sparse_layers
from amoe.models.config import ModelConfig
from amoe.models.options import Options

NAME = "Qwen3MoeForCausalLM"


def parse(hf: dict[str, Any]) -> ModelConfig:
    """Translate the object in `config.json`. Raises `CheckpointError` for what cannot be served."""
    options = Options(hf)
    fields = common_fields(options, max_position=32768, rms_norm_eps=1e-6)
    options.refuse_sliding_window(fields["max_position_embeddings"], active=options.flag("use_sliding_window"))
    sparse = sparse_layers(options, fields["num_layers"])
    return ModelConfig(
        architecture=NAME,
        intermediate_size=0 if all(sparse) else options.integer("intermediate_size"),
        moe_intermediate_size=options.integer("moe_intermediate_size"),
        norm_topk_prob=options.flag("norm_topk_prob"),
        sparse_layers=sparse,
        qk_norm="head",
        **fields,
    )


ARCHITECTURE = Architecture(name=NAME, parse=parse)

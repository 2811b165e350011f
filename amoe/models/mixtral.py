"""Mixtral: every layer is an MoE layer, and the weights of the chosen experts sum to one."""

from __future__ import annotations

from typing import Any

from amoe.models.architecture import Architecture, common_fields
from amoe.models.config import ModelConfig
from amoe.models.options import Options

NAME = "MixtralForCausalLM"


def parse(hf: dict[str, Any]) -> ModelConfig:
    """Translate the object in `config.json`. Raises `CheckpointError` for what cannot be served."""
    options = Options(hf)
    fields = common_fields(options, max_position=131072, rms_norm_eps=1e-5, rope_theta=1e6, eos_token_id=2)
    options.refuse_sliding_window(fields["max_position_embeddings"])
    return ModelConfig(
        architecture=NAME,
        intermediate_size=0,
        moe_intermediate_size=options.integer("intermediate_size"),
        norm_topk_prob=True,
        round_topk_weights=False,
        sparse_layers=(True,) * fields["num_layers"],
        **fields,
    )


ARCHITECTURE = Architecture(
    name=NAME, parse=parse, moe_modules=("block_sparse_moe", "mlp"), expert_projections=("w1", "w3", "w2")
)

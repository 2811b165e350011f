"""OLMoE: every layer is an MoE layer; queries and keys are normalised over their full width."""

from __future__ import annotations

from typing import Any

from amoe.models.architecture import Architecture, common_fields
from amoe.models.config import ModelConfig
from amoe.models.options import Options

NAME = "OlmoeForCausalLM"


def parse(hf: dict[str, Any]) -> ModelConfig:
    """Translate the object in `config.json`. Raises `CheckpointError` for what cannot be served."""
    options = Options(hf)
    fields = common_fields(options, max_position=4096, rms_norm_eps=1e-5, eos_token_id=50279)
    options.refuse_sliding_window(fields["max_position_embeddings"])
    return ModelConfig(
        architecture=NAME,
        intermediate_size=0,
        moe_intermediate_size=options.integer("intermediate_size"),
        norm_topk_prob=options.flag("norm_topk_prob"),
        sparse_layers=(True,) * fields["num_layers"],
        qk_norm="full",
        clip_qkv=None if hf.get("clip_qkv") is None else options.number("clip_qkv"),
        **fields,
    )


ARCHITECTURE = Architecture(name=NAME, parse=parse)

"""What an architecture file provides: a translation of `config.json`, and the names of the expert tensors.

All architectures served here name the rest of their tensors alike (`model.layers.{layer}.self_attn.q_proj.weight` and
so on, see `loader.py`); they differ in the experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from amoe.models.config import ModelConfig
from amoe.models.options import Options


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One model family.

    Attributes:
        name: the class name in `architectures` of `config.json`.
        parse: translates the object in `config.json`; raises `CheckpointError` for what cannot be served.
        moe_modules: names of the MoE block inside a layer, in the order in which they are tried.
        expert_projections: names of one expert's gate, up and down projections, where each expert has its own tensors.

    Fused experts are `experts.gate_up_proj` [E, 2I, H] and `experts.down_proj` [E, H, I] in every family.
    """

    name: str
    parse: Callable[[dict[str, Any]], ModelConfig]
    moe_modules: tuple[str, ...] = ("mlp",)
    expert_projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


def common_fields(
    options: Options,
    *,
    max_position: int,
    rms_norm_eps: float,
    rope_theta: float = 10_000.0,
    eos_token_id: int | None = None,
    num_experts: tuple[str, ...] = ("num_experts", "num_local_experts"),
) -> dict[str, Any]:
    """Fields of `ModelConfig` that every family spells alike; the arguments are Hugging Face's defaults of the family.

    Raises:
        CheckpointError: an option is missing, wrong or unsupported.
    """
    options.refuse_unless("hidden_act", "silu", "swish")
    options.refuse_unless("attention_bias", False)
    options.refuse_unless("quantization_config")
    vocab_size = options.integer("vocab_size")
    hidden_size = options.integer("hidden_size")
    heads = options.integer("num_attention_heads")
    kv_heads = options.integer("num_key_value_heads", default=heads)
    experts = options.integer(*num_experts)
    top_k = options.integer("num_experts_per_tok")
    max_position = options.integer("max_position_embeddings", default=max_position)
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_layers": options.integer("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": options.integer("head_dim", default=hidden_size // heads),
        "num_experts": experts,
        "top_k": top_k,
        "rope": options.rope(max_position, rope_theta),
        "rms_norm_eps": options.number("rms_norm_eps", default=rms_norm_eps),
        "tie_word_embeddings": options.flag("tie_word_embeddings"),
        "max_position_embeddings": max_position,
        "eos_token_ids": options.eos_token_ids(vocab_size, eos_token_id),
        "torch_dtype": options.dtype(),
    }
    options.check(
        heads % kv_heads == 0, f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
    )
    options.check(fields["head_dim"] % 2 == 0, f"head_dim {fields['head_dim']} is odd: rotary embedding needs pairs")
    options.check(top_k <= experts, f"num_experts_per_tok {top_k} is greater than the number of experts {experts}")
    return fields


def sparse_layers(options: Options, num_layers: int) -> tuple[bool, ...]:
    """Which layers are MoE layers in the Qwen families: every `decoder_sparse_step`th, less `mlp_only_layers`."""
    step = options.integer("decoder_sparse_step", default=1)
    dense = options.layers("mlp_only_layers", num_layers)
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))

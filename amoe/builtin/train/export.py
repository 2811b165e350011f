"""Write a checkpoint in Hugging Face format (`Qwen3MoeForCausalLM`, one tensor an expert, bf16)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from amoe.builtin.train.config import ModelConfig
from amoe.builtin.train.parameters import num_parameters, parameter_shapes, views
from amoe.builtin.train.tokenizer import save_tokenizer

GENERATION_CONFIG = {"do_sample": False, "eos_token_id": 0, "max_new_tokens": 128, "pad_token_id": 0}

PLAIN_NAMES = {
    "input_norm": "input_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "o": "self_attn.o_proj",
    "post_norm": "post_attention_layernorm",
    "router": "mlp.gate",
}


def to_hf_tensors(flat: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """Split the flat buffer `[num_parameters]` into transformers' tensors, in bf16."""
    tensors: dict[str, Tensor] = {}
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    top = {"embed": "model.embed_tokens.weight", "head": "lm_head.weight", "norm": "model.norm.weight"}
    for name, tensor in views(flat, parameter_shapes(config)).items():
        if name in top:
            tensors[top[name]] = tensor
            continue
        layer, kind = name.split(".")
        prefix = f"model.layers.{layer}"
        if kind in PLAIN_NAMES:
            tensors[f"{prefix}.{PLAIN_NAMES[kind]}.weight"] = tensor
        elif kind == "qkv":
            for part, rows in zip("qkv", tensor.split([query, key, key]), strict=True):
                tensors[f"{prefix}.self_attn.{part}_proj.weight"] = rows
        elif kind == "gate_up":
            for expert, rows in enumerate(tensor):
                gate, up = rows.chunk(2)
                tensors[f"{prefix}.mlp.experts.{expert}.gate_proj.weight"] = gate
                tensors[f"{prefix}.mlp.experts.{expert}.up_proj.weight"] = up
        else:
            for expert, rows in enumerate(tensor):
                tensors[f"{prefix}.mlp.experts.{expert}.down_proj.weight"] = rows
    return {name: tensor.to(torch.bfloat16).contiguous().clone() for name, tensor in tensors.items()}


def from_hf_tensors(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The parameters of `network.Network`, in fp32, from a checkpoint's tensors: the inverse of `to_hf_tensors`."""
    shapes = parameter_shapes(config)
    flat = torch.zeros(num_parameters(shapes))
    params = views(flat, shapes)
    params["embed"].copy_(tensors["model.embed_tokens.weight"])
    params["head"].copy_(tensors["lm_head.weight"])
    params["norm"].copy_(tensors["model.norm.weight"])
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for name, hf_name in PLAIN_NAMES.items():
            params[f"{layer}.{name}"].copy_(tensors[f"{prefix}.{hf_name}.weight"])
        params[f"{layer}.qkv"].copy_(torch.cat([tensors[f"{prefix}.self_attn.{part}_proj.weight"] for part in "qkv"]))
        for expert in range(config.num_experts):
            at = f"{prefix}.mlp.experts.{expert}"
            gate_up = torch.cat([tensors[f"{at}.gate_proj.weight"], tensors[f"{at}.up_proj.weight"]])
            params[f"{layer}.gate_up"][expert].copy_(gate_up)
            params[f"{layer}.down"][expert].copy_(tensors[f"{at}.down_proj.weight"])
    return params


def export(flat: Tensor, config: ModelConfig, tokenizer: Tokenizer, directory: Path) -> None:
    """Write the checkpoint. Each file is written elsewhere and renamed, so that a reader never sees half of one."""
    staging = directory.with_name(f".{directory.name}.new")
    staging.mkdir(parents=True, exist_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(to_hf_tensors(flat, config), staging / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(tokenizer, staging, config.max_position_embeddings)
    for name, content in (("config.json", config.to_hf()), ("generation_config.json", GENERATION_CONFIG)):
        (staging / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for path in sorted(staging.iterdir()):
        path.chmod(0o644)  # safetensors writes for the owner alone
        os.replace(path, directory / path.name)
    staging.rmdir()

"""Read an exported checkpoint back for evaluation."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from amoe.builtin.train.config import ModelConfig
from amoe.builtin.train.export import from_hf_tensors


@dataclass(frozen=True)
class Checkpoint:
    """A model to measure: sizes, fp32 parameters (of bf16 values), tokenizer."""

    config: ModelConfig
    params: dict[str, Tensor]
    tokenizer: Tokenizer


def load_checkpoint(directory: Path) -> Checkpoint:
    """Read `config.json`, `model.safetensors` and `tokenizer.json`."""
    raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config = ModelConfig(**{field.name: raw[field.name] for field in fields(ModelConfig)})
    tensors = load_file(directory / "model.safetensors")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return Checkpoint(config, from_hf_tensors(tensors, config), tokenizer)

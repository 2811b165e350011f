"""What a model is, whatever the checkpoint calls it; and reading that from a checkpoint's `config.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from amoe.errors import CheckpointError

TorchDTypeName = Literal["float32", "bfloat16", "float16"]
QKNorm = Literal["none", "head", "full"]
RopeType = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding. What a type does not use keeps its default.

    Attributes:
        theta: base of the wavelengths.
        factor: linear, llama3, yarn: how much the context is stretched.
        original_max_position: llama3, yarn: the context before stretching.
        low_freq_factor, high_freq_factor: llama3.
        beta_fast, beta_slow, truncate: yarn, bounds of the ramp between the two frequencies.
        attention_factor: factor of cosine and sine (yarn).
    """

    type: RopeType = "default"
    theta: float
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model in amoe's words; every architecture file translates a `config.json` into this.

    Attributes:
        architecture: name in `ARCHITECTURES`.
        intermediate_size: of the MLP of dense layers; 0 if there are none.
        moe_intermediate_size: of one expert.
        top_k: experts per token.
        norm_topk_prob: the weights of the chosen experts are scaled to sum to one.
        round_topk_weights: the weights are rounded to the model's dtype (no difference in float32).
        sparse_layers: [num_layers], True for an MoE layer, False for a dense one.
        shared_expert_intermediate_size: of the gated shared expert; 0 if there is none.
        qk_norm: RMSNorm of queries and keys over each head, over the full width, or not at all.
        qkv_bias: the projections to queries, keys and values have a bias.
        clip_qkv: their values are clamped to ± this.
        eos_token_ids: ids that end a sequence, of `config.json` and `generation_config.json`, ascending.
        torch_dtype: of the checkpoint's weights.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    num_experts: int
    top_k: int
    norm_topk_prob: bool
    round_topk_weights: bool = True
    sparse_layers: tuple[bool, ...]
    shared_expert_intermediate_size: int = 0
    rope: RopeConfig
    rms_norm_eps: float
    qk_norm: QKNorm = "none"
    qkv_bias: bool = False
    clip_qkv: float | None = None
    tie_word_embeddings: bool = False
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...] = ()
    torch_dtype: TorchDTypeName = "float32"

    @property
    def q_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_key_value_heads * self.head_dim


def load_model_config(path: str | Path) -> ModelConfig:
    """Read the `config.json` (and `generation_config.json`) of a checkpoint directory.

    Raises:
        CheckpointError: the directory, the file or an option in it cannot be served; the message names it.
    """
    from amoe.models.registry import ARCHITECTURES  # the registry's files need ModelConfig: not at the top

    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory; MODEL must be a checkpoint directory")
    raw = read_json_object(directory / "config.json")
    names = raw.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError(f"{directory / 'config.json'}: architectures names no model class")
    architecture = ARCHITECTURES.get(names[0])
    if architecture is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise CheckpointError(f"{directory / 'config.json'}: architecture {names[0]} is not supported; known: {known}")
    generation = directory / "generation_config.json"
    if generation.exists():
        raw["generation_eos_token_id"] = read_json_object(generation).get("eos_token_id")
    try:
        return architecture.parse(raw)
    except CheckpointError as error:
        raise CheckpointError(f"{directory / 'config.json'}: {error}") from None


def read_json_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file is missing, unreadable, not JSON or not an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise CheckpointError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, not a JSON object")
    return content

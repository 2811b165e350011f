"""Sizes of the built-in model and of its training run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the model, named as in `Qwen3MoeConfig`."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    num_experts: int = 16
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 192
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6

    def to_hf(self) -> dict[str, Any]:
        """The content of `config.json`."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            **asdict(self),
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": None,
            "decoder_sparse_step": 1,
            "dtype": "bfloat16",
            "eos_token_id": 0,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "intermediate_size": self.moe_intermediate_size * self.num_experts_per_tok,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "output_router_logits": False,
            "pad_token_id": 0,
            "rope_scaling": None,
            "router_aux_loss_coef": 0.001,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
        }


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. Learning rates follow elapsed time over `budget_s`, so a busy machine still ends on time."""

    budget_s: float = 3600.0
    max_steps: int = 20_000
    num_workers: int = 2
    micro_batch_tokens: int = 2048
    micro_batches_per_step: int = 4
    seq_len: int = 512
    long_seq_len: int = 2048  # the last part of the run, so that every position of the rotary embedding has been seen
    long_from: float = 0.9  # share of the budget after which sequences are long
    warmup: float = 0.02  # share of the budget
    decay_from: float = 0.35  # share of the budget after which the rate falls linearly to 0
    muon_lr: float = 0.015
    adam_lr: float = 2e-3
    embed_lr: float = 5e-3
    router_lr: float = (
        5e-4  # its input has norm 16: at the rate of the others it would lock in before the experts differ
    )
    weight_decay: float = 0.05
    momentum: float = 0.95
    # Load balance is over the running load of whole batches, so that no expert dies and yet domains may differ.
    aux_start: float = 0.01
    aux_end: float = 0.006
    aux_until: float = 0.25  # share of the budget
    z_coef: float = 1e-4
    seed: int = 20261122
    library_repeats: int = 2  # library sources come twice an epoch, tests once, documentation three times
    doc_repeats: int = 3
    eval_tokens: int = 32_768
    eval_every_s: float = 600.0
    first_export_s: float = 120.0
    export_every_s: float = 600.0

"""Make a checkpoint of random weights in Hugging Face format (OLMoE), to measure speed with.

    python -m benchmarks.make_checkpoint DIR [--size full|small] [--router-skew 1.0] [--seed 0]

`full` has 1.341 B parameters (hidden 1024, 16 layers, 32 experts top-4, expert width 768, vocabulary 32000, bf16: 2.7
GB), `small` 142 M; every number has a flag. Shard by shard, one layer in memory at a time. The answers are noise, but
text: the tokenizer is the built-in model's, and ids beyond it decode to ` t<id>`, so that every token streams.

Router skew. Random routers are nearly balanced, real ones are not. `--router-skew S` makes some experts of each layer
popular on purpose: coordinate 0 of the hidden state is a constant that the embedding sets; nothing writes it, and only
the router reads it, with a weight of its own per expert: a bias in effect, which OLMoE has no name for. The biases are
fitted by simulation so that an expert's share of the (token, expert) pairs is proportional to exp(S · z), z standard
normal, independent in each layer, as far as top-k allows (no expert gets more than one pair per token). What it does
not imitate: popular experts here are popular with every token alike; in real models they go with topics and positions.
Deeper layers feel the bias up to 10 % less, because the constant is normalised together with a growing residual.
Measured on `small` with random prompts, a layer's busiest expert has 1.3 (S = 0) and 4.9 (S = 1) times the mean; the
simulation says 2.6 for S = 0.5, 4.9 for 1 and 6.5 for 1.5.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from amoe.builtin import builtin_model_path

Float64Array = npt.NDArray[np.float64]

RESIDUAL_GAIN = 0.5  # of all blocks together, against an embedding of 1: keeps the constant's share of the residual
HEAD_GAIN = 3.0  # deviation of the logits
EOS_TOKEN_ID = 0
BYTES_PER_ELEMENT = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of the model, in OLMoE's words."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_experts: int
    top_k: int
    intermediate_size: int
    vocab_size: int
    max_position: int

    def as_config(self) -> dict[str, Any]:
        """`config.json`."""
        return {
            "architectures": ["OlmoeForCausalLM"],
            "model_type": "olmoe",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.top_k,
            "norm_topk_prob": False,
            "max_position_embeddings": self.max_position,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "clip_qkv": None,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": EOS_TOKEN_ID,
            "pad_token_id": EOS_TOKEN_ID,
            "torch_dtype": "bfloat16",
        }


SIZES = {
    "full": Shape(
        hidden_size=1024,
        num_layers=16,
        num_heads=16,
        num_experts=32,
        top_k=4,
        intermediate_size=768,
        vocab_size=32000,
        max_position=4096,
    ),
    "small": Shape(
        hidden_size=512,
        num_layers=8,
        num_heads=8,
        num_experts=32,
        top_k=4,
        intermediate_size=256,
        vocab_size=32000,
        max_position=4096,
    ),
}


class Weights:
    """Random tensors by name, reproducible whatever the order they are asked for in.

    Args:
        shape: of the model.
        seed: of everything.
        router_skew: deviation of the logarithm of expert popularity; 0 adds nothing to the random routers.
    """

    def __init__(self, shape: Shape, seed: int, router_skew: float) -> None:
        self.shape = shape
        self._seed = seed
        self._router_skew = router_skew

    def shards(self) -> Iterator[dict[str, torch.Tensor]]:
        """The tensors of each file: embedding and head first, then a layer each."""
        yield self._ends()
        for layer in range(self.shape.num_layers):
            yield self._layer(layer)

    def _ends(self) -> dict[str, torch.Tensor]:
        shape = self.shape
        embedding = self._normal("model.embed_tokens.weight", shape.vocab_size, shape.hidden_size, 1.0)
        embedding[:, 0] = 1.0
        head = self._reader("lm_head.weight", shape.vocab_size) * HEAD_GAIN
        return {
            "model.embed_tokens.weight": embedding,
            "lm_head.weight": head,
            "model.norm.weight": torch.ones(shape.hidden_size, dtype=torch.bfloat16),
        }

    def _layer(self, layer: int) -> dict[str, torch.Tensor]:
        shape, prefix = self.shape, f"model.layers.{layer}"
        hidden, width = shape.hidden_size, shape.intermediate_size
        tensors = {}
        for part in "qkv":
            tensors[f"{prefix}.self_attn.{part}_proj.weight"] = self._reader(f"{prefix}.{part}", hidden)
        tensors[f"{prefix}.self_attn.o_proj.weight"] = self._writer(f"{prefix}.o", hidden)
        for name in ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        tensors[f"{prefix}.mlp.gate.weight"] = self._router(layer)
        for expert in range(shape.num_experts):
            at = f"{prefix}.mlp.experts.{expert}"
            tensors[f"{at}.gate_proj.weight"] = self._reader(f"{at}.gate", width)
            tensors[f"{at}.up_proj.weight"] = self._reader(f"{at}.up", width)
            tensors[f"{at}.down_proj.weight"] = self._writer(f"{at}.down", width)
        return tensors

    def _router(self, layer: int) -> torch.Tensor:
        """[num_experts, hidden_size]: noise of deviation 1 over tokens, and the biases in column 0."""
        router = self._reader(f"model.layers.{layer}.router", self.shape.num_experts)
        if self._router_skew > 0:
            rng = np.random.default_rng((self._seed, layer))
            wanted = popularity(rng, self.shape.num_experts, self.shape.top_k, self._router_skew)
            router[:, 0] = torch.from_numpy(fit_biases(rng, wanted))
        return router

    def _reader(self, name: str, rows: int) -> torch.Tensor:
        """[rows, hidden_size] that makes unit inputs into unit outputs and does not see the constant."""
        tensor = self._normal(name, rows, self.shape.hidden_size, 1 / math.sqrt(self.shape.hidden_size))
        tensor[:, 0] = 0.0
        return tensor

    def _writer(self, name: str, columns: int) -> torch.Tensor:
        """[hidden_size, columns] whose outputs add up to `RESIDUAL_GAIN` over all blocks and spare the constant."""
        deviation = RESIDUAL_GAIN / math.sqrt(2 * self.shape.num_layers * columns)
        tensor = self._normal(name, self.shape.hidden_size, columns, deviation)
        tensor[0] = 0.0
        return tensor

    def _normal(self, name: str, rows: int, columns: int, deviation: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed}:{name}".encode()))
        return (torch.randn(rows, columns, generator=generator) * deviation).to(torch.bfloat16)


def popularity(rng: np.random.Generator, num_experts: int, top_k: int, skew: float) -> Float64Array:
    """[num_experts] pairs per token of each expert: log-normal, at most 0.95 each, `top_k` in sum."""
    shares = np.exp(skew * rng.standard_normal(num_experts))
    limit = max(0.95, top_k / num_experts)
    wanted = shares * top_k / shares.sum()
    for _ in range(100):  # what the most popular cannot take goes to the others, in proportion
        wanted = np.minimum(wanted, limit)
        free = wanted < limit
        if not free.any() or abs(wanted.sum() - top_k) < 1e-9:
            break
        wanted[free] *= (top_k - wanted[~free].sum()) / wanted[free].sum()
    return np.minimum(wanted, limit)


def fit_biases(
    rng: np.random.Generator, wanted: Float64Array, num_tokens: int = 8192, rounds: int = 60
) -> Float64Array:
    """[num_experts] biases on standard normal logits that give each expert about `wanted` pairs per token."""
    noise = rng.standard_normal((num_tokens, len(wanted)))
    top_k = round(wanted.sum())
    biases = np.zeros(len(wanted))
    for _ in range(rounds):
        chosen = np.argpartition(noise + biases, -top_k, axis=1)[:, -top_k:]
        measured = np.bincount(chosen.ravel(), minlength=len(wanted)) / num_tokens
        biases += 0.3 * (np.log(wanted) - np.log(np.maximum(measured, 0.5 / num_tokens)))
        biases -= biases.mean()
    return biases


def extend_tokenizer(source: Path, directory: Path, vocab_size: int) -> None:
    """Copy the tokenizer, with a word for every id up to `vocab_size`, which no text is ever encoded to.

    Raises:
        ValueError: if the vocabulary is smaller than the tokenizer's.
    """
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    taken = {*vocabulary.values(), *(token["id"] for token in tokenizer.get("added_tokens", []))}
    if max(taken) >= vocab_size:
        raise ValueError(f"--vocab-size must be at least {max(taken) + 1}, the vocabulary of the built-in tokenizer")
    vocabulary.update({f"Ġt{index}": index for index in range(vocab_size) if index not in taken})  # Ġ is a space
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    shutil.copyfile(source / "tokenizer_config.json", directory / "tokenizer_config.json")


def make_checkpoint(directory: Path, shape: Shape, *, seed: int = 0, router_skew: float = 0.0) -> int:
    """Write the checkpoint. Returns its parameters.

    Raises:
        ValueError: the sizes do not fit together.
    """
    if shape.hidden_size % shape.num_heads or shape.hidden_size // shape.num_heads % 2:
        raise ValueError("--hidden-size must be --num-heads times an even number")
    if not 0 < shape.top_k <= shape.num_experts:
        raise ValueError("--top-k must be between 1 and --num-experts")
    directory.mkdir(parents=True, exist_ok=True)
    extend_tokenizer(builtin_model_path(), directory, shape.vocab_size)
    num_files = shape.num_layers + 1
    file_of: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(Weights(shape, seed, router_skew).shards(), start=1):
        file = f"model-{number:05d}-of-{num_files:05d}.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        file_of.update(dict.fromkeys(tensors, file))
        total += sum(tensor.numel() for tensor in tensors.values())
    index = {"metadata": {"total_size": total * BYTES_PER_ELEMENT}, "weight_map": file_of}
    for name, content in (
        ("model.safetensors.index.json", index),
        ("config.json", shape.as_config()),
        ("generation_config.json", {"eos_token_id": EOS_TOKEN_ID, "do_sample": False}),
    ):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return total


def main() -> None:
    """Parse the flags and write the checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", choices=SIZES, default="full", help="defaults of the other sizes")
    fields = tuple(asdict(SIZES["full"]))
    for flag in fields:
        parser.add_argument("--" + flag.replace("_", "-"), type=int)
    parser.add_argument("--router-skew", type=float, default=0.0, metavar="S", help="deviation of log popularity")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sizes = asdict(SIZES[args.size])
    sizes.update({flag: getattr(args, flag) for flag in fields if getattr(args, flag) is not None})
    try:
        total = make_checkpoint(args.directory, Shape(**sizes), seed=args.seed, router_skew=args.router_skew)
    except ValueError as error:
        parser.error(str(error))
    print(f"{args.directory}: {total / 1e9:.3f} B parameters, {total * BYTES_PER_ELEMENT / 1e9:.2f} GB")


if __name__ == "__main__":
    main()

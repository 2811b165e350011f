"""Tiny random checkpoints, made by transformers, and transformers' own answers for them: shared by all tests."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models

ARCHES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'][0] + '>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)
# Odd sizes on purpose: 7 experts, a vocabulary of 101, an intermediate size that no vector width divides.
_COMMON: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_OF_ARCH: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 7, "intermediate_size": 36, "head_dim": 16},
    "olmoe": {"num_experts": 7, "intermediate_size": 36, "num_attention_heads": 3, "num_key_value_heads": 3},
    "qwen2_moe": {
        "num_experts": 7,
        "intermediate_size": 40,
        "moe_intermediate_size": 36,
        "shared_expert_intermediate_size": 28,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    },
    "qwen3_moe": {"num_experts": 7, "intermediate_size": 40, "moe_intermediate_size": 36, "head_dim": 16},
}


class Greedy(NamedTuple):
    """transformers' greedy continuation of one prompt.

    Attributes:
        token_ids: the tokens; as many as asked for, unless an end-of-sequence token came (it is the last then).
        logprobs: of those tokens.
        margins: by how much each beat the second best: a near tie explains a difference.
    """

    token_ids: list[int]
    logprobs: list[float]
    margins: list[float]


def hf_classes(arch: str) -> tuple[type, type]:
    """transformers' config and model class of `mixtral`, `olmoe`, `qwen2_moe` or `qwen3_moe`."""
    import transformers

    stem = "".join(part.capitalize() for part in arch.split("_"))
    return getattr(transformers, f"{stem}Config"), getattr(transformers, f"{stem}ForCausalLM")


def make_checkpoint(
    path: Path,
    arch: str,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    fused: bool = False,
    shards: bool = False,
    **overrides: Any,
) -> Path:
    """Write a random model with a tokenizer to `path`, and return it.

    Args:
        arch: one of `ARCHES`.
        fused: one tensor for all experts of a layer, instead of tensors for each.
        shards: several files with an index.
        overrides: options of transformers' config class.
    """
    config_class, model_class = hf_classes(arch)
    config = config_class(**(_COMMON | _OF_ARCH[arch] | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms start as ones and biases as zeros: both would hide mistakes
                    parameter.add_(torch.empty_like(parameter).uniform_(-0.4, 0.4))
    model.to(dtype).save_pretrained(path, max_shard_size="40KB" if shards else "1GB")
    if fused:
        fuse_experts(path)
    write_tokenizer(path, config.vocab_size)
    return path


def fuse_experts(path: Path) -> None:
    """Rewrite a single-file checkpoint with fused expert tensors, under the names that transformers has in memory."""
    tensors = load_file(path / "model.safetensors")
    experts: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    rest: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if ".experts." not in name:
            rest[name.replace(".block_sparse_moe.", ".mlp.")] = tensor
            continue
        prefix, tail = name.replace(".block_sparse_moe.", ".mlp.").split(".experts.")
        number, projection, _ = tail.split(".")
        projection = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(projection, projection)
        experts.setdefault(prefix, {}).setdefault(int(number), {})[projection] = tensor
    for prefix, parts in experts.items():
        each = [parts[number] for number in sorted(parts)]
        rest[f"{prefix}.experts.gate_up_proj"] = torch.stack([torch.cat((p["gate_proj"], p["up_proj"])) for p in each])
        rest[f"{prefix}.experts.down_proj"] = torch.stack([p["down_proj"] for p in each])
    save_file(rest, path / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """A tokenizer of single characters: `<unk>` 0, `<s>` 1, `</s>` 2, then printable ASCII, then Latin letters."""
    specials = ["<unk>", "<s>", "</s>"]
    characters = [chr(i) for i in (*range(32, 127), *range(161, 161 + vocab_size))]
    vocabulary = {token: i for i, token in enumerate((specials + characters)[:vocab_size])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens(specials)
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": CHAT_TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


@functools.lru_cache(maxsize=8)
def hf_model(path: Path) -> Any:
    """transformers' model of a checkpoint, in float32, with plain attention and a loop over experts."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def hf_logits(path: Path, token_ids: Sequence[int]) -> torch.Tensor:
    """transformers' logits [T, V] in float32 for a sequence of T tokens."""
    with torch.inference_mode():
        return hf_model(path)(input_ids=torch.tensor([list(token_ids)])).logits[0].float()


def hf_greedy(path: Path, prompts: Sequence[Sequence[int]], max_new: int, *, ignore_eos: bool = True) -> list[Greedy]:
    """transformers' greedy continuation of every prompt, each alone, in float32."""
    return [_hf_greedy_one(path, prompt, max_new, ignore_eos) for prompt in prompts]


def _hf_greedy_one(path: Path, prompt: Sequence[int], max_new: int, ignore_eos: bool) -> Greedy:
    model = hf_model(path)
    eos = model.generation_config.eos_token_id
    stops = set() if ignore_eos or eos is None else {eos} if isinstance(eos, int) else set(eos)
    result = Greedy([], [], [])
    cache, ids = None, torch.tensor([list(prompt)])
    with torch.inference_mode():
        while len(result.token_ids) < max_new:
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            best = torch.log_softmax(out.logits[0, -1].float(), dim=-1).topk(2)
            token = int(best.indices[0])
            result.token_ids.append(token)
            result.logprobs.append(float(best.values[0]))
            result.margins.append(float(best.values[0] - best.values[1]))
            if token in stops:
                break
            ids = torch.tensor([[token]])
    return result

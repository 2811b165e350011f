"""The parameters of the training model: views into one flat buffer, so that workers share and sum them as one array.

Shapes: V vocabulary, H hidden, Q query width, K key or value width, D head, E experts, I expert width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from amoe.builtin.train.config import ModelConfig

Shapes = dict[str, tuple[int, ...]]


def parameter_shapes(config: ModelConfig) -> Shapes:
    """Names and shapes, in the order of the flat buffer. Each rank's share of the optimizer is told by `owner_of`."""
    hidden, width = config.hidden_size, config.moe_intermediate_size
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes: Shapes = {"embed": (config.vocab_size, hidden), "head": (config.vocab_size, hidden), "norm": (hidden,)}
    for layer in range(config.num_hidden_layers):
        shapes |= {
            f"{layer}.input_norm": (hidden,),
            f"{layer}.qkv": (query + 2 * key, hidden),
            f"{layer}.q_norm": (config.head_dim,),
            f"{layer}.k_norm": (config.head_dim,),
            f"{layer}.o": (hidden, query),
            f"{layer}.post_norm": (hidden,),
            f"{layer}.router": (config.num_experts, hidden),
            f"{layer}.gate_up": (config.num_experts, 2 * width, hidden),
            f"{layer}.down": (config.num_experts, hidden, width),
        }
    return shapes


def num_parameters(shapes: Shapes) -> int:
    """Elements of the flat buffer."""
    return sum(math.prod(shape) for shape in shapes.values())


def views(flat: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """Name -> view of `flat` `[num_parameters]`."""
    result, offset = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        result[name] = flat[offset : offset + size].view(shape)
        offset += size
    return result


def initialise(flat: Tensor, config: ModelConfig, seed: int) -> None:
    """Fill the flat fp32 buffer: norms 1, matrices normal with a fan-in scale, outputs of residual branches smaller."""
    generator = torch.Generator().manual_seed(seed)
    depth_scale = 1.0 / math.sqrt(2 * config.num_hidden_layers)
    for name, tensor in views(flat, parameter_shapes(config)).items():
        kind = name.split(".")[-1]
        if kind.endswith("norm"):
            tensor.fill_(1.0)
            continue
        std = {"embed": 0.02, "head": 0.02, "router": 0.02}.get(kind, 1.0 / math.sqrt(tensor.shape[-1]))
        if kind in {"o", "down"}:
            std *= depth_scale
        tensor.normal_(0.0, std, generator=generator)


def owned_names(shapes: Shapes, rank: int, num_workers: int) -> Iterator[str]:
    """Parameters that `rank` updates: layers in turn, embedding and head to different ranks."""
    for name in shapes:
        prefix = name.split(".")[0]
        number = int(prefix) if prefix.isdigit() else int(name == "head")
        if number % num_workers == rank:
            yield name

"""A model of integers: every value is a 64-bit hash of all that the token has met on its way, so that a lost residual,
a missed, doubled or foreign expert, or a KV entry of somebody else changes the tokens that come out.

Twice: `mix` and its array functions run inside the virtual cluster; `Oracle` is the same model as a plain loop over
one sequence, in Python integers, without batches, slots, queues or a cache.
Shape letters: n tokens, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MASK = 2**64 - 1
GOLDEN, PRIME = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9
EMBED, KEY, NORM, DENSE, HEAD, GATE = 11, 23, 37, 51, 67, 83  # salts: one per place where values are hashed
SPREAD_BITS = 20


@dataclass(frozen=True)
class ModelSpec:
    """Layers with experts or without, and how the router leans.

    Attributes:
        bias: [E] added to the router's scores, which are spread over 2**20: large values make an expert hot.
    """

    sparse_layers: tuple[bool, ...]
    top_k: int
    bias: tuple[int, ...]
    vocab: int = 64
    eos: int = 5

    @property
    def num_layers(self) -> int:
        return len(self.sparse_layers)

    @property
    def num_experts(self) -> int:
        return len(self.bias)


def as_words(values):
    """Any integers as an array of 64-bit words."""
    return np.asarray(values).astype(np.uint64)


def mix(a, b):
    """Hash of words `a` [...] with words or an integer `b`. Not commutative."""
    b = b if isinstance(b, np.ndarray) else np.full(1, b, np.uint64)
    words = (a ^ np.uint64(GOLDEN)) * np.uint64(PRIME) + b
    words = (words ^ (words >> np.uint64(29))) * np.uint64(PRIME)
    return words ^ (words >> np.uint64(32))


def embed(token_ids, positions):
    """[n] the first hidden state of a token."""
    return mix(mix(as_words(token_ids), as_words(positions)), EMBED)


def key(hidden, layer):
    """[n] what attention(layer) leaves in the KV cache for a token."""
    return mix(hidden, KEY + 1000 * layer)


def route(hidden, layer, spec):
    """Router: ids [n, K] int64 and weights [n, K] float32, which are whole numbers of 1 to 256."""
    scores = mix(mix(hidden, GATE + 1000 * layer)[:, None], np.arange(spec.num_experts, dtype=np.uint64)[None])
    scores = (scores >> np.uint64(64 - SPREAD_BITS)).astype(np.int64) + np.asarray(spec.bias)
    topk_ids = np.argsort(-scores, axis=1, kind="stable")[:, : spec.top_k]
    weights = mix(hidden[:, None], as_words(topk_ids)) & np.uint64(255)
    return topk_ids, weights.astype(np.float32) + np.float32(1)


def scores(hidden, layer, spec):
    """[n, E] float32 softmax of the router, so to speak: halves, in the order in which it prefers experts."""
    raw = mix(mix(hidden, GATE + 1000 * layer)[:, None], np.arange(spec.num_experts, dtype=np.uint64)[None])
    raw = (raw >> np.uint64(64 - SPREAD_BITS)).astype(np.int64) + np.asarray(spec.bias)
    order = np.argsort(-raw, axis=1, kind="stable")
    halves = np.empty(raw.shape, np.float32)
    np.put_along_axis(halves, order, np.broadcast_to(0.5 ** np.arange(1, spec.num_experts + 1), raw.shape), axis=1)
    return halves


def run_experts(inputs, layer, expert_ids, weights):
    """[n] sum over the experts of a token; id -1 is none."""
    pairs = mix(mix(inputs[:, None], as_words(expert_ids.astype(np.int64) + 1000 * layer)), as_words(weights))
    return np.where(expert_ids >= 0, pairs, np.uint64(0)).sum(axis=1, dtype=np.uint64)


def sample(hidden, spec):
    """[n] the next token of each sequence."""
    return (mix(hidden, HEAD) % np.uint64(spec.vocab)).astype(np.int64)


def _mix(a: int, b: int) -> int:
    word = ((a ^ GOLDEN) * PRIME + b) & MASK
    word = ((word ^ (word >> 29)) * PRIME) & MASK
    return word ^ (word >> 32)


class Oracle:
    """The model on one sequence, token by token.

    Attributes:
        token_ids: prompt and generated tokens.
        generated: the tokens that the engine must stream.
        keys: [layer][position] of the KV cache.
        hidden: [position] hidden states that enter the head, were it asked about every token.
        experts: (layer, expert) that any of its tokens needs.
        routed: [position][MoE layer] experts of a token, best first.
    """

    def __init__(self, spec: ModelSpec, prompt: list[int], max_tokens: int) -> None:
        self.spec = spec
        self.token_ids = list(prompt)
        self.generated: list[int] = []
        self.keys: list[list[int]] = [[] for _ in spec.sparse_layers]
        self.hidden: list[int] = []
        self.experts: set[tuple[int, int]] = set()
        self.routed: list[list[list[int]]] = []
        self._sums = [0] * spec.num_layers
        position = 0
        while len(self.generated) < max_tokens and spec.eos not in self.generated[-1:]:
            hidden = self._forward(self.token_ids[position], position)
            self.hidden.append(hidden)
            position += 1
            if position == len(self.token_ids):
                token = _mix(hidden, HEAD) % spec.vocab
                self.generated.append(token)
                self.token_ids.append(token)

    def _forward(self, token_id: int, position: int) -> int:
        hidden = _mix(_mix(token_id, position), EMBED)
        self.routed.append([])
        for layer, sparse in enumerate(self.spec.sparse_layers):
            self.keys[layer].append(_mix(hidden, KEY + 1000 * layer))
            self._sums[layer] = (self._sums[layer] + self.keys[layer][-1]) & MASK
            residual = _mix(hidden, self._sums[layer])
            moe_input = _mix(residual, NORM)
            if not sparse:
                hidden = _mix(residual, DENSE)
                continue
            total = 0
            self.routed[position].append(self._route(moe_input, layer))
            for expert in self.routed[position][-1]:
                self.experts.add((layer, expert))
                weight = (_mix(moe_input, expert) & 255) + 1
                total += _mix(_mix(moe_input, expert + 1000 * layer), weight)
            hidden = _mix(residual, total & MASK)
        return hidden

    def _route(self, moe_input: int, layer: int) -> list[int]:
        gate = _mix(moe_input, GATE + 1000 * layer)
        scores = [(_mix(gate, e) >> (64 - SPREAD_BITS)) + bias for e, bias in enumerate(self.spec.bias)]
        return sorted(range(len(scores)), key=lambda e: -scores[e])[: self.spec.top_k]

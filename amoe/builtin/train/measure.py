"""Held-out loss and routing of a checkpoint, and simple baselines to judge the loss by.

Legend: N scored tokens, L layers, E experts, k experts per token.
"""

from __future__ import annotations

import lzma
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from amoe.builtin.train.batches import END_OF_TEXT_ID, TokenArray, encode_documents
from amoe.builtin.train.checkpoint import Checkpoint
from amoe.builtin.train.corpus import KIND_DOC, Document
from amoe.builtin.train.network import Network, Reroute
from amoe.builtin.train.token_classes import ClassArray, classify

BATCH_TOKENS = 8192


@dataclass(frozen=True)
class HeldOut:
    """Held-out documents joined as in training: end-of-text in front of each. All arrays `[N + 1]` but `num_bytes`."""

    tokens: TokenArray
    is_prose: NDArray[np.bool_]  # language reference rather than source code
    classes: ClassArray
    num_bytes: tuple[int, int]  # of code, of prose


def join_held_out(checkpoint: Checkpoint, documents: tuple[Document, ...]) -> HeldOut:
    """Encode and classify."""
    encoded = encode_documents(checkpoint.tokenizer, documents)
    prose = [np.full(len(tokens), d.kind == KIND_DOC) for tokens, d in zip(encoded, documents, strict=True)]
    classes = [np.concatenate([np.zeros(1, np.int8), classify(checkpoint.tokenizer, d)]) for d in documents]
    sizes = [sum(len(d.text.encode()) for d in documents if (d.kind == KIND_DOC) == kind) for kind in (False, True)]
    end = np.full(1, END_OF_TEXT_ID, dtype=np.int64)
    return HeldOut(
        tokens=np.concatenate([*encoded, end.astype(np.uint16)]),
        is_prose=np.concatenate([*prose, end.astype(bool)]),
        classes=np.concatenate([*classes, end.astype(np.int8)]),
        num_bytes=(sizes[0], sizes[1]),
    )


@dataclass(frozen=True)
class Scores:
    """`losses: [N]` nats of predicting token i + 1; `topk_ids: [L, N, k]` experts of token i, best first."""

    losses: NDArray[np.float32]
    topk_ids: NDArray[np.int16]


@torch.no_grad()
def score(
    checkpoint: Checkpoint, tokens: TokenArray, length: int, reroute: Reroute | None = None, every: int = 1
) -> Scores:
    """Score `tokens [N + 1]` in windows of `length` positions without overlap, every `every`-th of them, in fp32."""
    network = Network(checkpoint.config, reroute)
    losses, ids = [], []
    stream = torch.from_numpy(tokens.astype(np.int64))
    for span in _spans(len(tokens) - 1, length, every):
        inputs = torch.stack([stream[start:stop] for start, stop in span])
        targets = torch.cat([stream[start + 1 : stop + 1] for start, stop in span])
        states, routings = network.hidden(checkpoint.params, inputs)
        losses.append(_cross_entropy(states, checkpoint.params["head"], targets))
        ids.append(torch.stack([routing.topk_ids for routing in routings]).to(torch.int16))
    return Scores(torch.cat(losses).numpy(), torch.cat(ids, dim=1).numpy())


def _spans(num_tokens: int, length: int, every: int) -> list[list[tuple[int, int]]]:
    """Batches of windows (start, stop) of equal width; a shorter last window is a batch of its own."""
    windows = [(start, min(start + length, num_tokens)) for start in range(0, num_tokens, length * every)]
    short = windows.pop() if windows[-1][1] - windows[-1][0] < length else None
    rows = max(1, BATCH_TOKENS // length)
    batches = [windows[at : at + rows] for at in range(0, len(windows), rows)]
    return [*batches, [short]] if short else batches


def _cross_entropy(states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    parts = zip(states.split(1024), targets.split(1024), strict=True)
    return torch.cat([torch.nn.functional.cross_entropy(s @ head.t(), t, reduction="none") for s, t in parts])


def random_experts(config_experts: int, k: int, seed: int) -> Reroute:
    """Replace the router's choice by k distinct experts at random (the gate weights stay)."""
    generator = torch.Generator().manual_seed(seed)

    def reroute(layer: int, logits: Tensor) -> Tensor:
        return torch.rand(logits.shape[0], config_experts, generator=generator).topk(k, dim=-1).indices

    return reroute


def shuffled_experts(num_layers: int, num_experts: int, k: int, seed: int) -> Reroute:
    """Keep the router, permute the experts behind it: same load, same grouping of tokens, wrong experts."""
    generator = torch.Generator().manual_seed(seed)
    permutations = [torch.randperm(num_experts, generator=generator) for _ in range(num_layers)]

    def reroute(layer: int, logits: Tensor) -> Tensor:
        return permutations[layer][logits.topk(k, dim=-1).indices]

    return reroute


def next_best_experts(k: int) -> Reroute:
    """Use the router's choices k+1 .. 2k instead of 1 .. k."""

    def reroute(layer: int, logits: Tensor) -> Tensor:
        return logits.topk(2 * k, dim=-1).indices[:, k:]

    return reroute


def most_loaded_experts(shares: NDArray[np.float64], k: int) -> Reroute:
    """Use, for every token, the k experts of each layer that are chosen most often: a dense model of equal cost."""
    best = torch.from_numpy(np.argsort(-shares, axis=-1)[:, :k].copy())

    def reroute(layer: int, logits: Tensor) -> Tensor:
        return best[layer].expand(logits.shape[0], k)

    return reroute


def only_in_layer(reroute: Reroute, layer: int, k: int) -> Reroute:
    """Apply `reroute` in one layer and the router's own choice in the others."""

    def chosen(at: int, logits: Tensor) -> Tensor:
        return reroute(at, logits) if at == layer else logits.topk(k, dim=-1).indices

    return chosen


def ngram_losses(train: list[TokenArray], tokens: TokenArray, vocab_size: int) -> tuple[float, float]:
    """Mean nats of a unigram model, and of a bigram model with absolute discounting, on `tokens [N + 1]`."""
    joined = np.concatenate(train).astype(np.int64)
    unigram = (np.bincount(joined, minlength=vocab_size) + 1.0) / (len(joined) + vocab_size)
    previous, current = tokens[:-1].astype(np.int64), tokens[1:].astype(np.int64)
    counts = np.bincount(joined[:-1] * vocab_size + joined[1:], minlength=vocab_size * vocab_size)
    table = counts.reshape(vocab_size, vocab_size)
    totals, kinds = table.sum(1), (table > 0).sum(1)
    discount = 0.75
    seen = np.maximum(table[previous, current] - discount, 0) / np.maximum(totals[previous], 1)
    back = np.where(totals[previous] > 0, discount * kinds[previous] / np.maximum(totals[previous], 1), 1.0)
    bigram = seen + back * unigram[current]
    return float(-np.log(unigram[current]).mean()), float(-np.log(bigram).mean())


def compressed_bits_per_byte(documents: tuple[Document, ...]) -> float:
    """What `lzma` needs for the held-out text alone."""
    raw = "".join(document.text for document in documents).encode()
    return 8 * len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)) / len(raw)


def bits_per_byte(total_nats: float, num_bytes: int) -> float:
    """Summed nats over a text of `num_bytes` UTF-8 bytes."""
    return total_nats / math.log(2) / num_bytes

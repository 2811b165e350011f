"""Token streams: documents encoded once, then shuffled, joined and cut into windows, anew for every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from amoe.builtin.train.corpus import KIND_DOC, KIND_LIBRARY, Corpus, Document

TokenArray = NDArray[np.uint16]
END_OF_TEXT_ID = 0


def encode_documents(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[TokenArray]:
    """Each document's tokens, with the end-of-text token in front (where generation of a new document would start)."""
    encoded = tokenizer.encode_batch([document.text for document in documents])
    return [np.array([END_OF_TEXT_ID, *e.ids], dtype=np.uint16) for e in encoded]


def write_tokens(path: Path, tokenizer: Tokenizer, corpus: Corpus, library_repeats: int, doc_repeats: int) -> int:
    """Encode the corpus into one `.npz`; returns training tokens an epoch (repeats included)."""
    train = encode_documents(tokenizer, corpus.train)
    repeats = {KIND_LIBRARY: library_repeats, KIND_DOC: doc_repeats}
    counts = [repeats.get(document.kind, 1) for document in corpus.train]
    held_out = np.concatenate(encode_documents(tokenizer, corpus.held_out))
    lengths = np.array([len(tokens) for tokens in train])
    np.savez(path, train=np.concatenate(train), lengths=lengths, repeats=np.array(counts), held_out=held_out)
    return int((lengths * np.array(counts)).sum())


class Batches:
    """Micro-batches by index, the same in every process: `micro_batch(i)` needs no communication."""

    def __init__(self, path: Path, seed: int) -> None:
        data = np.load(path)
        self._documents: list[TokenArray] = np.split(data["train"], np.cumsum(data["lengths"])[:-1])
        self._order = np.repeat(np.arange(len(self._documents)), data["repeats"])
        self._held_out: TokenArray = data["held_out"]
        self._seed = seed
        self._epoch_key: tuple[int, int] | None = None
        self._stream: TokenArray = np.empty(0, dtype=np.uint16)
        self._windows = np.empty(0, dtype=np.int64)
        self.epoch_tokens = int(sum(len(self._documents[i]) for i in self._order))

    def micro_batch(self, index: int, num_tokens: int, length: int) -> Tensor:
        """Windows `[num_tokens // length, length + 1]` of the `index`-th micro-batch."""
        per_epoch = (self.epoch_tokens - 1) // length
        rows = []
        for position in range(index * (num_tokens // length), (index + 1) * (num_tokens // length)):
            epoch, window = divmod(position, per_epoch)
            self._enter(epoch, length)
            start = self._windows[window] * length
            rows.append(self._stream[start : start + length + 1])
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def held_out(self, index: int, num_tokens: int, length: int) -> Tensor:
        """Held-out windows `[num_tokens // length, length + 1]`, spread evenly over the held-out text."""
        rows = num_tokens // length
        stride = 2 * length  # every second window: a sample of the whole text in half the time
        starts = [((index * rows + row) * stride) % (len(self._held_out) - length - 1) for row in range(rows)]
        return torch.from_numpy(np.stack([self._held_out[s : s + length + 1] for s in starts]).astype(np.int64))

    def _enter(self, epoch: int, length: int) -> None:
        """Lay out the stream of an epoch: documents in random order, then windows in random order."""
        if self._epoch_key == (epoch, length):
            return
        generator = np.random.default_rng((self._seed, epoch, length))
        self._stream = np.concatenate([self._documents[i] for i in generator.permutation(self._order)])
        self._windows = generator.permutation((len(self._stream) - 1) // length)
        self._epoch_key = (epoch, length)

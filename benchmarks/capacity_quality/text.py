"""The held-out text of the built-in model, in windows that stand for requests, in disjoint subsets."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer

from amoe.builtin.train.batches import encode_documents
from amoe.builtin.train.corpus import load_corpus


def held_out_subsets(model_path: Path, length: int, size: int, at_most: int, seed: int = 0) -> list[torch.Tensor]:
    """Subsets [size, length] int64 of windows without overlap, none across documents, mixed as unrelated requests are.

    Args:
        model_path: whose tokenizer encodes.
        at_most: subsets; fewer where the text does not give as many.
    """
    tokenizer = Tokenizer.from_file(str(model_path / "tokenizer.json"))
    windows = []
    for document in encode_documents(tokenizer, load_corpus().held_out):
        whole = len(document) // length
        windows += [torch.from_numpy(document[: whole * length].astype("int64")).view(whole, length)]
    every = torch.cat(windows)
    mixed = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))]
    count = min(at_most, len(mixed) // size)
    if count == 0:
        raise ValueError(f"the held-out text has {len(mixed)} windows of {length} tokens, fewer than {size}")
    return list(mixed[: count * size].split(size))

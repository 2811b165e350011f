"""Batches to test transports with, and what it means that two are equal."""

from __future__ import annotations

import numpy as np
import torch

from amoe.types import Batch, BatchKind


def make_batch(
    num_tokens: int = 3,
    *,
    kind: BatchKind = BatchKind.DISPATCH,
    src: int = 0,
    dst: int = 1,
    top_k: int = 2,
    hidden_size: int = 8,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    layer: int = 4,
    wave: int = 1,
    epoch: int = 7,
    count: int | None = None,
) -> Batch:
    """A batch of random content, the same for the same arguments."""
    rng = np.random.default_rng(seed)
    count = num_tokens if count is None else count
    batch = Batch(kind, src, dst, layer, wave, epoch, count, latest_iteration=int(rng.integers(2**31)))
    batch.backlog_s, batch.row_s = 0.25, 2.0**-20
    if kind == BatchKind.ANNOUNCE:
        return batch
    batch.slots = rng.integers(0, 2**31 - 1, num_tokens, dtype=np.int32)
    batch.generations = rng.integers(0, 2**31 - 1, num_tokens, dtype=np.int32)
    if num_tokens:
        batch.payload = torch.from_numpy(rng.standard_normal((num_tokens, hidden_size))).to(dtype)
    if kind == BatchKind.DISPATCH and num_tokens:
        batch.iterations = rng.integers(0, 2**31 - 1, num_tokens, dtype=np.int32)
        batch.expert_ids = rng.integers(-1, 512, (num_tokens, top_k), dtype=np.int16)
        batch.expert_weights = rng.random((num_tokens, top_k), dtype=np.float32)
    return batch


def assert_same(actual: Batch, expected: Batch) -> None:
    """Bit equality of all that travels."""
    for name in ("kind", "src", "dst", "layer", "wave", "epoch", "count", "latest_iteration", "backlog_s"):
        assert getattr(actual, name) == getattr(expected, name), name
    names = ["slots", "generations"]
    if expected.kind == BatchKind.DISPATCH:
        names += ["iterations", "expert_ids", "expert_weights"]
    for name in names:
        left, right = getattr(actual, name), getattr(expected, name)
        assert left.dtype == right.dtype, name
        assert left.shape == right.shape, name
        np.testing.assert_array_equal(left, right)
    if expected.payload is None:
        assert actual.payload is None
    else:
        assert actual.payload is not None
        assert actual.payload.dtype == expected.payload.dtype
        assert torch.equal(actual.payload.cpu(), expected.payload.cpu())

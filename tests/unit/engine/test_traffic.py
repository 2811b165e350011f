"""What a worker sends is counted as it is sent."""

from __future__ import annotations

import torch

from amoe.engine.traffic import TrafficCounts
from amoe.stats import TrafficSnapshot
from amoe.types import Batch, BatchKind


def test_batches_rows_and_bytes_by_kind_and_path():
    traffic = TrafficCounts(rank=0)
    payload = torch.zeros((3, 8), dtype=torch.bfloat16)
    traffic.count(Batch(BatchKind.DISPATCH, 0, 1, 0, count=3, payload=payload))
    traffic.count(Batch(BatchKind.DISPATCH, 0, 2, 0))  # a marker
    traffic.count(Batch(BatchKind.DISPATCH, 0, 0, 0, count=2))  # to itself: the rows stay where they are
    traffic.count(Batch(BatchKind.ANNOUNCE, 0, 1, 0, count=50))  # of tokens that come later
    assert traffic.snapshot() == [
        TrafficSnapshot("dispatch", "local", 1, 2, 0),
        TrafficSnapshot("dispatch", "remote", 2, 3, 48),
        TrafficSnapshot("announce", "remote", 1, 0, 0),
    ]

"""What a worker counts of the time that tokens spend in its queues and blocks."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from amoe.core.micro_queue import MicroQueues
from amoe.engine.worker_stats import StatsKeeper
from amoe.types import BlockId, BlockKind


def push(queues: MicroQueues, block: BlockId, count: int) -> None:
    queues.push(block, (np.zeros(count),), np.zeros(count, np.int32), 0.0)


@pytest.fixture
def queues() -> MicroQueues:
    return MicroQueues(num_layers=2, num_waves=2)


def test_waiting_is_counted_in_token_seconds_over_all_waves(queues: MicroQueues):
    keeper = StatsKeeper(0, "colocated", 2, 4)
    push(queues, BlockId(BlockKind.ATTENTION, 1, 0), 3)
    push(queues, BlockId(BlockKind.ATTENTION, 1, 1), 2)
    keeper.waited(queues.depth, 0.5)
    queues.drain(queues.index(BlockId(BlockKind.ATTENTION, 1, 0)))
    keeper.waited(queues.depth, 2.0)
    core = SimpleNamespace(queues=queues, holds=lambda kind: True)
    found = {(q.kind, q.layer): (q.depth, q.waited_s) for q in keeper._queues(core, 1.0)}
    assert found["attention", 1] == (2, pytest.approx(5 * 0.5 + 2 * 2.0))
    assert found["attention", 0] == found["experts", 1] == found["head", 2] == (0, 0.0)


def test_a_worker_tells_of_its_own_blocks_only(queues: MicroQueues):
    keeper = StatsKeeper(0, "experts", 2, 4)
    core = SimpleNamespace(queues=queues, holds=lambda kind: kind is BlockKind.EXPERTS)
    assert [(q.kind, q.layer) for q in keeper._queues(core, 1.0)] == [("experts", 0), ("experts", 1)]


def test_time_in_a_block_is_counted_once_per_token(queues: MicroQueues):
    keeper = StatsKeeper(0, "colocated", 2, 4)
    keeper.observe(SimpleNamespace(block=BlockId(BlockKind.HEAD, 2), num_tokens=4), 0.25)
    core = SimpleNamespace(queues=queues, holds=lambda kind: kind is not BlockKind.EXPERTS)
    assert {(q.kind, q.layer): q.ran_s for q in keeper._queues(core, 1.0)}["head", 2] == pytest.approx(1.0)

"""The fault-injecting double: off by default, seeded, and it does what its plan says."""

from __future__ import annotations

import select
import time
from pathlib import Path

import msgspec
import pytest

from amoe.transport.faulty import FaultPlan, FaultyTransport
from amoe.transport.inproc import InprocFabric
from amoe.transport.link_faults import READ_INTERVAL_S, LinkFaults
from amoe.types import Batch
from tests.unit.transport.transport_batches import assert_same, make_batch


class Pair:
    """Rank 0 sends numbered batches to a faulty rank 1."""

    def __init__(self, plan: FaultPlan | None = None) -> None:
        self.fabric = InprocFabric(3)
        self.faulty = FaultyTransport(self.fabric.endpoint(1), plan)
        self.epochs: list[int] = []

    def send(self, count: int, src: int = 0) -> None:
        for epoch in range(count):
            self.fabric.endpoint(src).send(make_batch(2, src=src, epoch=epoch, seed=epoch))

    def poll(self) -> list[Batch]:
        batches = self.faulty.poll()
        for batch in batches:
            assert_same(batch, make_batch(2, src=batch.src, epoch=batch.epoch, seed=batch.epoch))
        self.epochs += [batch.epoch for batch in batches]
        return batches

    def drain(self, polls: int = 200) -> list[int]:
        for _ in range(polls):
            self.poll()
        return self.epochs


def test_off_by_default() -> None:
    pair = Pair()
    pair.send(50)
    pair.poll()
    assert pair.epochs == list(range(50))
    assert pair.faulty.rank == 1
    assert pair.faulty.flush()


def test_delay_keeps_order_per_peer() -> None:
    pair = Pair(FaultPlan(seed=1, delay=0.5))
    pair.send(50)
    pair.poll()
    assert len(pair.epochs) < 50
    assert pair.drain() == list(range(50))
    assert pair.faulty.counts.delayed > 0


def test_delay_may_reorder() -> None:
    pair = Pair(FaultPlan(seed=1, delay=0.5, keep_order=False))
    pair.send(50)
    assert pair.drain() != list(range(50))
    assert sorted(pair.epochs) == list(range(50))


def test_held_batches_keep_the_descriptor_readable() -> None:
    pair = Pair(FaultPlan(delay=1.0, max_delay_polls=3))
    pair.send(1)
    while not pair.poll():
        assert select.select([pair.faulty.fileno()], [], [], 0)[0]
    assert not select.select([pair.faulty.fileno()], [], [], 0)[0]


def test_duplicate() -> None:
    pair = Pair(FaultPlan(seed=2, duplicate=0.3))
    pair.send(50)
    epochs = pair.drain()
    assert set(epochs) == set(range(50))
    assert len(epochs) == 50 + pair.faulty.counts.duplicated > 50


def test_drop() -> None:
    pair = Pair(FaultPlan(seed=3, drop=0.3))
    pair.send(50)
    epochs = pair.drain()
    assert len(epochs) == 50 - pair.faulty.counts.dropped < 50
    assert epochs == sorted(epochs)


def test_cut_severs_one_peer_both_ways() -> None:
    pair = Pair()
    pair.faulty.cut(0)
    pair.send(3, src=0)
    pair.send(2, src=2)
    assert [batch.src for batch in pair.poll()] == [2, 2]
    pair.faulty.send(make_batch(1, src=1, dst=0))
    pair.faulty.send(make_batch(1, src=1, dst=2))
    assert pair.fabric.endpoint(0).poll() == []
    assert len(pair.fabric.endpoint(2).poll()) == 1
    assert pair.faulty.counts.cut == 4
    pair.faulty.heal(0)
    pair.send(1, src=0)
    assert len(pair.poll()) == 1


def test_same_seed_same_faults() -> None:
    plan = FaultPlan(seed=5, delay=0.4, duplicate=0.2, drop=0.2, keep_order=False)
    runs = []
    for _ in range(2):
        pair = Pair(plan)
        pair.send(40)
        runs.append(pair.drain())
    assert runs[0] == runs[1]


def test_batches_to_oneself_do_not_suffer() -> None:
    pair = Pair(FaultPlan(drop=1.0))
    batch = make_batch(2, src=1, dst=1)
    pair.faulty.send(batch)
    assert pair.faulty.poll() == [batch]


def test_links_that_a_file_cuts(tmp_path: Path) -> None:
    """The rank in the list is cut off from all others, at both ends."""
    path = tmp_path / "links.json"
    fabric = InprocFabric(3)
    ends = [FaultyTransport(fabric.endpoint(rank), steered_by=path) for rank in range(3)]

    def exchange() -> list[list[int]]:
        for src, end in enumerate(ends):
            for dst in range(3):
                end.send(make_batch(1, src=src, dst=dst))
        return [sorted(batch.src for batch in end.poll()) for end in ends]

    everybody = [[0, 1, 2]] * 3
    assert exchange() == everybody
    for content, expected in ((b'{"cut": [1]}', [[0, 2], [1], [0, 2]]), (b"{}", everybody)):
        path.write_bytes(content)
        time.sleep(2 * READ_INTERVAL_S)
        assert exchange() == expected


def test_slow_links_keep_order_and_wake_their_reader() -> None:
    pair = Pair()
    pair.faulty.set_links(LinkFaults(delay_s={0: 0.5}))  # longer than this process may be kept from running
    pair.send(3)
    pair.send(2, src=2)
    assert [batch.src for batch in pair.poll()] == [2, 2]
    assert pair.poll() == []
    assert not select.select([pair.faulty.fileno()], [], [], 0)[0]  # nobody is woken for nothing
    pair.faulty.set_links(LinkFaults())
    pair.send(1)  # behind those that are late
    while len(pair.epochs) < 6:
        assert select.select([pair.faulty.fileno()], [], [], 10)[0]
        pair.poll()
    assert pair.epochs == [0, 1, 0, 1, 2, 0]
    pair.poll()
    assert not select.select([pair.faulty.fileno()], [], [], 0)[0]
    pair.send(1)
    assert len(pair.poll()) == 1


def test_a_wrong_file_is_not_taken_for_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "links.json"
    path.write_text('{"cut": "all"}')
    with pytest.raises(msgspec.ValidationError):
        FaultyTransport(InprocFabric(1).endpoint(0), steered_by=path).poll()


def test_close_is_idempotent() -> None:
    pair = Pair()
    pair.faulty.close()
    pair.faulty.close()


@pytest.mark.parametrize("wrong", [{"drop": 1.5}, {"delay": -0.1}, {"max_delay_polls": 0}])
def test_plan_is_validated(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        FaultPlan(**wrong)

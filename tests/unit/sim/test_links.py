"""Ports, latency and the queue at a receiver."""

from __future__ import annotations

import numpy as np
import pytest

from amoe.profiles.links import Fabric, LinkProfile
from amoe.sim.events import EventQueue
from amoe.sim.links import HEADER_BYTES, Network, batch_bytes
from amoe.types import Batch, BatchKind

ROW_BYTES = 1000.0
FABRIC = Fabric(devices_per_node=4, intra=LinkProfile(1e-5, 1e9), inter=LinkProfile(1e-4, 1e8))


def make_batch(src: int, dst: int, num_rows: int = 10) -> Batch:
    column = np.zeros(num_rows, np.int32)
    return Batch(
        kind=BatchKind.DISPATCH,
        src=src,
        dst=dst,
        layer=0,
        count=num_rows,
        slots=column,
        generations=column,
        iterations=column,
        expert_ids=np.zeros((num_rows, 2), np.int16),
        expert_weights=np.zeros((num_rows, 2), np.float32),
    )


class Recorder:
    """A network of 8 devices, and when what arrived."""

    def __init__(self) -> None:
        self.events = EventQueue()
        self.network = Network(self.events, FABRIC, 8, ROW_BYTES, self._deliver)
        self.arrived: list[tuple[int, float]] = []

    def _deliver(self, batch: Batch) -> None:
        self.arrived.append((batch.src, self.events.now))

    def run(self) -> list[tuple[int, float]]:
        while len(self.events):
            self.events.step()
        return self.arrived


def test_bytes_are_header_columns_and_rows():
    assert batch_bytes(make_batch(0, 1), ROW_BYTES) == HEADER_BYTES + 10 * (12 + 2 * 6 + 1000)
    announcement = Batch(kind=BatchKind.ANNOUNCE, src=0, dst=1, layer=0, count=7)
    assert batch_bytes(announcement, ROW_BYTES) == HEADER_BYTES


@pytest.mark.parametrize(("dst", "link"), [(1, FABRIC.intra), (5, FABRIC.inter)])
def test_one_batch_is_sent_travels_and_is_taken_in(dst, link):
    recorder = Recorder()
    batch = make_batch(0, dst)
    recorder.network.send(batch)
    passing = batch_bytes(batch, ROW_BYTES) / link.bandwidth
    assert recorder.run() == [(0, pytest.approx(2 * passing + link.latency_s, rel=1e-12))]


def test_to_oneself_costs_nothing():
    recorder = Recorder()
    recorder.network.send(make_batch(3, 3))
    assert recorder.arrived == [(3, 0.0)]
    assert recorder.network.num_bytes == 0


def test_a_port_sends_one_batch_after_the_other():
    recorder = Recorder()
    batch = make_batch(0, 1)
    passing = batch_bytes(batch, ROW_BYTES) / FABRIC.intra.bandwidth
    for dst in (1, 2):
        recorder.network.send(make_batch(0, dst))
    times = [time for _, time in recorder.run()]
    assert times == pytest.approx([2 * passing + 1e-5, 3 * passing + 1e-5], rel=1e-12)


def test_two_senders_queue_at_one_receiver():
    recorder = Recorder()
    passing = batch_bytes(make_batch(0, 3), ROW_BYTES) / FABRIC.intra.bandwidth
    for src in (0, 1):
        recorder.network.send(make_batch(src, 3))
    assert recorder.run() == [
        (0, pytest.approx(2 * passing + 1e-5, rel=1e-12)),
        (1, pytest.approx(3 * passing + 1e-5, rel=1e-12)),
    ]


def test_the_receiver_serves_in_the_order_of_arrival_not_of_sending():
    recorder = Recorder()
    recorder.network.send(make_batch(0, 3, num_rows=100))
    recorder.network.send(make_batch(1, 3, num_rows=1))
    assert [src for src, _ in recorder.run()] == [1, 0]


def test_the_ports_to_node_and_network_are_apart():
    recorder = Recorder()
    for src in (0, 5):
        recorder.network.send(make_batch(src, 3))
    passing = batch_bytes(make_batch(0, 3), ROW_BYTES)
    assert dict(recorder.run()) == {
        0: pytest.approx(2 * passing / 1e9 + 1e-5, rel=1e-12),
        5: pytest.approx(2 * passing / 1e8 + 1e-4, rel=1e-12),
    }

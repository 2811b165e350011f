"""Shared memory: what all transports promise, and what is special about rings, doorbells and processes."""

from __future__ import annotations

import os
import random
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from amoe.errors import TransportError
from amoe.transport.shm import ShmTransport
from amoe.transport.shm_fabric import ShmFabric
from amoe.transport.wire import encoded_size
from amoe.types import Batch, BatchKind
from tests.unit.transport.transport_batches import assert_same, make_batch

RING = 4096


@pytest.fixture
def fabric() -> Iterator[ShmFabric]:
    fabric = ShmFabric.create(3, RING)
    yield fabric
    fabric.close()


def readable(descriptor: int, timeout_s: float = 0) -> bool:
    return bool(select.select([descriptor], [], [], timeout_s)[0])


def result_of(batch: Batch, dst: int) -> Batch:
    return Batch(
        BatchKind.RESULT,
        batch.dst,
        dst,
        batch.layer,
        batch.wave,
        batch.epoch,
        batch.count,
        batch.slots,
        batch.generations,
        payload=batch.payload,
        latest_iteration=batch.latest_iteration,
    )


def test_batches_arrive_once_and_in_order(fabric: ShmFabric) -> None:
    ends = [fabric.endpoint(rank) for rank in range(3)]
    sent = [make_batch(n, src=0, dst=2, seed=n, dtype=torch.bfloat16) for n in range(4)]
    for batch in sent:
        ends[0].send(batch)
    ends[1].send(make_batch(0, kind=BatchKind.ANNOUNCE, src=1, dst=2, count=9))
    received = ends[2].poll()
    for left, right in zip(received[:4], sent, strict=True):
        assert_same(left, right)
    assert received[4].count == 9
    assert ends[1].poll() == ends[2].poll() == []
    for end in ends:
        end.close()


def test_arrays_are_valid_until_the_next_poll(fabric: ShmFabric) -> None:
    writer, reader = fabric.endpoint(0), fabric.endpoint(1)
    large = make_batch(20, seed=1)
    assert encoded_size(large) > RING // 3
    writer.send(large)
    (received,) = reader.poll()
    for seed in range(2, 6):  # more than the ring has room for
        writer.send(make_batch(20, seed=seed))
        writer.flush()
    assert_same(received, large)
    writer.close()
    reader.close()


def test_loopback_needs_no_payload(fabric: ShmFabric) -> None:
    end = fabric.endpoint(1)
    batch = make_batch(2, src=1, dst=1)
    batch.payload = None
    end.send(batch)
    assert readable(end.fileno())
    assert end.poll() == [batch]
    assert not readable(end.fileno())
    end.close()


def test_descriptor_follows_the_doorbell(fabric: ShmFabric) -> None:
    writer, reader = fabric.endpoint(0), fabric.endpoint(1)
    assert not readable(reader.fileno())
    for _ in range(3):
        writer.send(make_batch(1))
        writer.send(make_batch(1))
        assert readable(reader.fileno())
        assert len(reader.poll()) == 2
        assert not readable(reader.fileno())
        assert reader.poll() == []
    writer.close()
    reader.close()


def test_ring_without_a_hint_is_drained(fabric: ShmFabric) -> None:
    """A poll between a sender's hint and its ring drains too early: the descriptor must not stay readable."""
    reader = fabric.endpoint(1)
    os.eventfd_write(fabric.spec.doorbell_fds[1], 1)
    for _ in range(10):
        assert reader.poll() == []
    assert not readable(reader.fileno())
    reader.close()


def test_backlog_keeps_order_and_copies(fabric: ShmFabric) -> None:
    writer, reader = fabric.endpoint(0), fabric.endpoint(1)
    for epoch in range(40):
        batch = make_batch(10, seed=epoch, epoch=epoch)
        writer.send(batch)
        assert batch.payload is not None
        batch.payload.fill_(float("nan"))  # the caller reuses its buffers
        batch.slots[:] = -1
    assert not writer.flush()
    epochs = []
    while len(epochs) < 40:
        # The reader only moves when its doorbell rings, the writer only when its own does: no wake-up may get lost.
        assert readable(reader.fileno())
        for batch in reader.poll():
            assert_same(batch, make_batch(10, seed=batch.epoch, epoch=batch.epoch))
            epochs.append(batch.epoch)
        if len(epochs) < 40:
            while not readable(writer.fileno()):
                assert readable(reader.fileno())
                epochs += [batch.epoch for batch in reader.poll()]
            writer.poll()
            writer.flush()
    assert epochs == list(range(40))
    assert writer.flush()
    writer.close()
    reader.close()


def test_oversized_batch_says_what_to_raise(fabric: ShmFabric) -> None:
    writer = fabric.endpoint(0)
    with pytest.raises(TransportError, match="raise ring_bytes"):
        writer.send(make_batch(400))
    writer.send(make_batch(40))
    writer.send(make_batch(40))
    assert not writer.flush()
    with pytest.raises(TransportError, match="raise ring_bytes"):
        writer.send(make_batch(400))
    with pytest.raises(TransportError, match="no worker of rank 7"):
        writer.send(make_batch(1, dst=7))
    writer.close()


def test_impostor_is_an_error(fabric: ShmFabric) -> None:
    writer, reader = fabric.endpoint(0), fabric.endpoint(1)
    writer.send(make_batch(1, src=2, dst=1))
    with pytest.raises(TransportError, match="worker 0 sent 1 a batch from 2"):
        reader.poll()
    writer.close()
    reader.close()


def test_close_while_a_batch_is_held(fabric: ShmFabric) -> None:
    writer, reader = fabric.endpoint(0), fabric.endpoint(1)
    writer.send(make_batch(3))
    (held,) = reader.poll()
    reader.close()
    reader.close()
    assert_same(held, make_batch(3))
    writer.close()


def test_two_threads_through_a_small_ring(fabric: ShmFabric) -> None:
    """Random sizes, both directions at once, each side sleeping on its descriptor only."""
    count = 300
    received: dict[int, list[int]] = {0: [], 1: []}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            end = fabric.endpoint(rank)
            sizes = random.Random(rank)
            sent = 0
            while sent < count or len(received[rank]) < count or not end.flush():
                for _ in range(min(sizes.randint(0, 6), count - sent)):
                    tokens = sizes.randint(0, 45)
                    end.send(make_batch(tokens, src=rank, dst=1 - rank, epoch=sent, seed=sent))
                    sent += 1
                assert readable(end.fileno(), 30) or sent < count
                end.flush()
                for batch in end.poll():
                    expected = make_batch(len(batch.slots), src=1 - rank, dst=rank, epoch=batch.epoch, seed=batch.epoch)
                    assert_same(batch, expected)
                    received[rank].append(batch.epoch)
            end.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors, errors
    assert received == {0: list(range(count)), 1: list(range(count))}


def test_between_processes(fabric: ShmFabric) -> None:
    spec = msgspec.json.encode(fabric.spec).decode()
    before = set(os.listdir("/dev/shm"))
    child = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("shm_child.py")), spec, "1"], pass_fds=fabric.fds()
    )
    end = ShmTransport.attach(fabric.spec, 0)
    try:
        assert set(os.listdir("/dev/shm")) <= before
        count = 200
        for epoch in range(count):
            end.send(make_batch(epoch % 30, epoch=epoch, seed=epoch, layer=-1 if epoch == count - 1 else 4))
        epochs = []
        while len(epochs) < count:
            assert readable(end.fileno(), 60)
            end.flush()
            for batch in end.poll():
                sent = make_batch(
                    batch.epoch % 30, epoch=batch.epoch, seed=batch.epoch, layer=-1 if batch.epoch == count - 1 else 4
                )
                assert_same(batch, result_of(sent, 0))
                epochs.append(batch.epoch)
        assert epochs == list(range(count))
        assert child.wait(60) == 0
    finally:
        child.kill()
        child.wait()
        end.close()


def test_fabric_gives_its_descriptors_back() -> None:
    before = set(os.listdir("/proc/self/fd"))
    fabric = ShmFabric.create(4, RING)
    end = fabric.endpoint(2)
    end.close()
    fabric.close()
    fabric.close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_untouched_rings_take_no_memory() -> None:
    fabric = ShmFabric.create(8, 64 << 20)
    writer, reader = fabric.endpoint(0), fabric.endpoint(1)
    for _ in range(2000):
        writer.send(make_batch(20))
        reader.poll()
    assert os.fstat(fabric.spec.memory_fd).st_blocks * 512 < 1 << 20
    writer.close()
    reader.close()
    fabric.close()

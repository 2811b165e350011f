"""What every transport promises, shown on the one that tests use; and the loopback."""

from __future__ import annotations

import select
import threading

import pytest

from amoe.errors import TransportError
from amoe.transport.inproc import InprocFabric
from amoe.types import BatchKind
from tests.unit.transport.transport_batches import assert_same, make_batch


def readable(descriptor: int) -> bool:
    return bool(select.select([descriptor], [], [], 0)[0])


def test_batches_arrive_once_and_in_order() -> None:
    fabric = InprocFabric(3)
    sent = [make_batch(n, src=0, dst=2, seed=n) for n in range(5)]
    for batch in sent:
        fabric.endpoint(0).send(batch)
    assert fabric.endpoint(1).poll() == []
    received = fabric.endpoint(2).poll()
    assert len(received) == len(sent)
    for left, right in zip(received, sent, strict=True):
        assert_same(left, right)
    assert fabric.endpoint(2).poll() == []
    assert fabric.endpoint(0).flush()
    fabric.close()


def test_sender_may_reuse_its_buffers() -> None:
    fabric = InprocFabric(2)
    batch, same = make_batch(4), make_batch(4)
    fabric.endpoint(0).send(batch)
    assert batch.payload is not None
    batch.payload.zero_()
    batch.slots[:] = 0
    assert_same(fabric.endpoint(1).poll()[0], same)
    fabric.close()


def test_expired_batches_are_poisoned() -> None:
    fabric = InprocFabric(2)
    fabric.endpoint(0).send(make_batch(4))
    kept = fabric.endpoint(1).poll()[0]
    fabric.endpoint(1).poll()
    assert kept.payload is not None
    assert kept.payload.isnan().all()
    assert (kept.slots == -1).all()
    fabric.close()


def test_loopback_hands_over_by_reference() -> None:
    fabric = InprocFabric(1)
    endpoint = fabric.endpoint(0)
    batch = make_batch(4, src=0, dst=0)
    batch.payload = None
    endpoint.send(batch)
    assert readable(endpoint.fileno())
    assert endpoint.poll() == [batch]
    assert not readable(endpoint.fileno())
    fabric.close()


def test_descriptor_is_readable_while_something_waits() -> None:
    fabric = InprocFabric(2)
    endpoint = fabric.endpoint(1)
    assert not readable(endpoint.fileno())
    fabric.endpoint(0).send(make_batch(0, kind=BatchKind.ANNOUNCE))
    assert readable(endpoint.fileno())
    endpoint.poll()
    assert not readable(endpoint.fileno())
    fabric.close()


def test_unknown_and_gone_destinations_are_errors() -> None:
    fabric = InprocFabric(2)
    with pytest.raises(TransportError, match="no worker of rank 5"):
        fabric.endpoint(0).send(make_batch(1, dst=5))
    fabric.endpoint(1).close()
    with pytest.raises(TransportError, match="gone"):
        fabric.endpoint(0).send(make_batch(1, dst=1))
    fabric.close()
    fabric.close()


def test_between_threads() -> None:
    fabric = InprocFabric(2)
    received: list[tuple[int, int]] = []

    def read() -> None:
        endpoint = fabric.endpoint(1)
        while len(received) < 200:
            select.select([endpoint.fileno()], [], [], 10)
            received.extend((batch.epoch, len(batch.slots)) for batch in endpoint.poll())

    reader = threading.Thread(target=read)
    reader.start()
    for epoch in range(200):
        fabric.endpoint(0).send(make_batch(epoch % 7, epoch=epoch))
    reader.join(60)
    assert received == [(epoch, epoch % 7) for epoch in range(200)]
    fabric.close()

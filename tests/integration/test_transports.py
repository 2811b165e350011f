"""What every transport promises, shown on each of them."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

import pytest
import zmq

from amoe.errors import ConfigError, TransportError
from amoe.transport.base import Peer, Transport
from amoe.transport.opening import DistributedSpec, TcpSpec, create_fabric, open_transport
from amoe.transport.tcp import TcpTransport
from amoe.types import Batch, BatchKind
from tests.transport_group import MOST_TOKENS, PATIENCE_S, Group, batch_of, collect, copied, readable
from tests.unit.transport.transport_batches import assert_same, make_batch

NETWORK = ["tcp", "distributed", "split"]
REAL = ["shm", *NETWORK]
ALL = ["inproc", *REAL]


def send_all(end: Transport, batches: list[Batch]) -> None:
    for batch in batches:
        end.send(batch)


def assert_all_same(received: list[Batch], sent: list[Batch]) -> None:
    assert len(received) == len(sent)
    for left, right in zip(received, sent, strict=True):
        assert_same(left, right)


@pytest.mark.parametrize("kind", ALL)
def test_batches_of_all_sizes_arrive_once_in_order_and_bit_for_bit(kind: str) -> None:
    with Group(kind, 2) as group:
        left, right = group.open_all(2)
        sizes = [0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, MOST_TOKENS, 1, 0, MOST_TOKENS, 7]
        sent = [batch_of(n, 0, 1, epoch) for epoch, n in enumerate(sizes)]
        sent.append(make_batch(0, kind=BatchKind.ANNOUNCE, src=0, dst=1, count=9))
        sent.append(make_batch(17, kind=BatchKind.RESULT, src=0, dst=1, hidden_size=64))
        send_all(left, sent)
        assert_all_same(collect(right, len(sent), (left,)), sent)
        assert not right.poll()
        assert left.flush()


@pytest.mark.parametrize("kind", ALL)
def test_sender_may_reuse_its_arrays_at_once(kind: str) -> None:
    with Group(kind, 2) as group:
        left, right = group.open_all(2)
        batch = batch_of(40, 0, 1)
        left.send(batch)
        batch.slots[:] = 0
        assert batch.payload is not None
        batch.payload.zero_()
        assert_all_same(collect(right, 1), [batch_of(40, 0, 1)])


@pytest.mark.parametrize("kind", ALL)
def test_everybody_to_everybody(kind: str) -> None:
    num_ranks, count = 5, 12
    with Group(kind, num_ranks) as group:
        ends = group.open_all(num_ranks)
        for epoch in range(count):
            for src, end in enumerate(ends):
                for dst in range(num_ranks):
                    end.send(batch_of(epoch % 7, src, dst, epoch))
        for rank, end in enumerate(ends):
            received = collect(end, num_ranks * count)
            for src in range(num_ranks):
                from_src = [batch for batch in received if batch.src == src]
                assert_all_same(from_src, [batch_of(epoch % 7, src, rank, epoch) for epoch in range(count)])


@pytest.mark.parametrize("kind", ALL)
def test_both_flood_each_other(kind: str) -> None:
    """Each sends far more than any ring and any socket holds before it reads at all."""
    count = 40
    with Group(kind, 2) as group:
        ends = group.open_all(2)
        for epoch in range(count):
            for rank, end in enumerate(ends):
                end.send(batch_of(MOST_TOKENS, rank, 1 - rank, epoch))
        epochs: dict[int, list[int]] = {0: [], 1: []}
        deadline = time.monotonic() + PATIENCE_S
        while min(map(len, epochs.values())) < count:
            assert time.monotonic() < deadline, epochs
            for rank, end in enumerate(ends):
                readable(end, 0.005)
                end.flush()
                for batch in end.poll():
                    if batch.epoch % 10 == 0:
                        assert_same(batch, batch_of(MOST_TOKENS, 1 - rank, rank, batch.epoch))
                    epochs[rank].append(batch.epoch)
        assert epochs == {0: list(range(count)), 1: list(range(count))}


@pytest.mark.parametrize("kind", ALL)
def test_batches_to_oneself_are_handed_over(kind: str) -> None:
    with Group(kind, 1) as group:
        (end,) = group.open_all(1)
        batch = batch_of(3, 0, 0)
        batch.payload = None
        end.send(batch)
        assert readable(end)
        assert end.poll() == [batch]
        assert not end.poll()


@pytest.mark.parametrize("kind", ALL)
def test_descriptor_tells_of_all_that_is_unread(kind: str) -> None:
    """Whoever waits for the descriptor before every single poll misses nothing, and is not woken for ever."""
    with Group(kind, 2) as group:
        left, right = group.open_all(2)
        sent = [batch_of(MOST_TOKENS, 0, 1, epoch) for epoch in range(12)]
        received: list[Batch] = []
        send_all(left, sent[:9])
        while len(received) < 9:
            left.flush()
            left.poll()
            assert readable(right)
            received += [copied(batch) for batch in right.poll()]
        for batch in sent[9:]:
            left.send(batch)
            received += collect(right, 1, (left,) if kind == "shm" else ())
        assert_all_same(received, sent)
        deadline = time.monotonic() + PATIENCE_S
        while readable(right, 0):
            assert time.monotonic() < deadline
            assert not right.poll()


@pytest.mark.parametrize("kind", REAL)
def test_new_life_gets_what_is_sent_to_it(kind: str) -> None:
    with Group(kind, 3) as group:
        left, former, other = group.open_all(3)
        left.send(batch_of(5, 0, 1))
        collect(former, 1)
        former.close()
        del group.peers[1], group.ends[1]
        group.tell()
        left.send(batch_of(5, 0, 1, epoch=1))  # it is gone: dropped
        left.send(batch_of(5, 0, 2, epoch=2))
        assert [batch.epoch for batch in collect(other, 1)] == [2]
        later = group.open(1, incarnation=1)
        group.tell()
        sent = [batch_of(6, 0, 1, epoch) for epoch in range(3, 40)]
        send_all(left, sent)
        received: list[Batch] = []
        while len(received) < len(sent):
            # In shared memory what the former life has not given back is read again.
            received += [batch for batch in collect(later, 1, (left,) if kind == "shm" else ()) if batch.epoch >= 3]
        assert_all_same(received, sent)
        later.send(batch_of(2, 1, 0, 7))
        assert_all_same(collect(left, 1), [batch_of(2, 1, 0, 7)])


@pytest.mark.parametrize("kind", REAL)
def test_destinations_that_cannot_be(kind: str) -> None:
    with Group(kind, 2) as group:
        (left,) = group.open_all(1)
        with pytest.raises(TransportError, match="no worker of rank 2"):
            left.send(batch_of(1, 0, 2))
        with pytest.raises(TransportError, match="no worker of rank -1"):
            left.send(batch_of(1, 0, -1))
        group.open(1)
        group.tell()
        with pytest.raises(TransportError, match="bytes"):
            left.send(batch_of(2 * MOST_TOKENS, 0, 1))


@pytest.mark.parametrize("kind", NETWORK)
def test_nobody_where_somebody_was_said_to_be(kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"tcp://127.0.0.1:{closed.getsockname()[1]}"
    with Group(kind, 4) as group:
        left, right = group.open_all(2)
        group.peers |= {2: Peer(0, address), 3: Peer(0, "tcp://[nonsense")}
        unheard, unreachable = batch_of(MOST_TOKENS, 0, 2), batch_of(MOST_TOKENS, 0, 3)
        left.send(unheard)
        group.tell()
        for _ in range(100):
            left.send(unheard)
            left.send(unreachable)
        left.send(batch_of(1, 0, 1))
        assert_all_same(collect(right, 1), [batch_of(1, 0, 1)])


@pytest.mark.parametrize("kind", NETWORK)
def test_close_gives_everything_back_with_things_in_flight(kind: str) -> None:
    def held() -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    def wait_until(most: tuple[int, int]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while any(now > limit for now, limit in zip(held(), most, strict=True)):
            assert time.monotonic() < deadline, (held(), most)
            time.sleep(0.05)

    num_threads = threading.active_count()
    open_flood_and_close(kind)  # leaves behind what a process opens only once
    wait_until((num_threads, 1 << 20))
    before = held()
    open_flood_and_close(kind)
    wait_until(before)


def open_flood_and_close(kind: str) -> None:
    with Group(kind, 4) as group:
        ends = group.open_all(3)
        group.peers[3] = Peer(0, "tcp://127.0.0.1:9")  # it never comes
        group.tell()
        for src, end in enumerate(ends):
            for dst in range(4):
                batch = batch_of(MOST_TOKENS, src, dst)
                for _ in range(20):
                    end.send(batch)
        for end in ends:
            heard: set[int] = set()
            while len(heard) < len(ends):  # a link that breaks while it is set up leaves something behind in gloo
                heard |= {batch.src for batch in collect(end, 1)}
        for end in ends:
            end.close()
            end.close()


@pytest.mark.parametrize("kind", ["shm", "tcp", "distributed"])
def test_killed_stopped_and_reborn_peers(kind: str) -> None:
    """One peer is stopped, one killed in the middle of an exchange: the third goes on; the killed one comes back."""
    # A link to one who is stopped for longer than the timeout is given up, with what is on its way: on a busy machine
    # this test takes longer than the usual two seconds.
    with Group(kind, 4, num_homes=1, link_timeout_s=120.0) as group:
        stopped, killed, healthy, reborn = group.start(4)
        end = group.open(0)
        for rank, child in enumerate((stopped, killed, healthy), start=1):
            group.peers[rank] = child.open(rank)
        group.tell()
        for rank in (1, 2, 3):
            end.send(batch_of(3, 0, rank, rank))
        assert {batch.src for batch in collect(end, 3)} == {1, 2, 3}

        os.kill(stopped.pid, signal.SIGSTOP)
        to_stopped, to_killed = batch_of(MOST_TOKENS, 0, 1), batch_of(MOST_TOKENS, 0, 2)
        for epoch in range(40):
            to_stopped.epoch = epoch
            end.send(to_stopped)
            end.send(to_killed)
            if epoch == 20:
                killed.kill()
            end.send(batch_of(9, 0, 3, epoch))
            assert answers_of(end, 3, 1) == [epoch]

        del group.peers[2]
        end.update(group.peers)
        end.send(batch_of(3, 0, 2, 99))
        group.peers[2] = reborn.open(2, incarnation=1)
        group.tell()
        for epoch in range(100, 120):
            end.send(batch_of(epoch, 0, 2, epoch))
        fresh = [epoch for epoch in answers_of(end, 2, 20, at_least=100) if epoch >= 100]
        assert fresh == list(range(100, 120))

        os.kill(stopped.pid, signal.SIGCONT)
        assert answers_of(end, 1, 40) == list(range(40))


def answers_of(end: Transport, src: int, count: int, at_least: int = 0) -> list[int]:
    """The epochs of the next answers from `src`, until `count` of `at_least` have come; those of others are let go."""
    epochs: list[int] = []
    while sum(epoch >= at_least for epoch in epochs) < count:
        assert readable(end), epochs
        end.flush()
        epochs += [batch.epoch for batch in end.poll() if batch.src == src]
    return epochs


def test_strangers_at_the_port() -> None:
    with Group("tcp", 2) as group:
        left, right = group.open_all(2)
        spec = group.spec()
        assert isinstance(spec, TcpSpec)
        _, _, port = right.address.rpartition(":")
        with socket.create_connection(("127.0.0.1", int(port))) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + os.urandom(4096))
        with zmq.Context() as context, context.socket(zmq.PUSH) as stranger:
            stranger.linger = 1000
            stranger.connect(right.address)
            for message in (b"", b"x", bytes(64), os.urandom(80), os.urandom(1 << 16)):
                stranger.send(message)
            # Of another cluster, and one of this that has lost its mind.
            other = TcpTransport(TcpSpec(num_ranks=2, host="127.0.0.1", max_record_bytes=1 << 20, secret="other"), 0)
            other.update(group.peers)
            other.send(batch_of(3, 0, 1))
            mad = TcpTransport(spec, 0)
            mad.update(group.peers | {0: Peer(0, right.address)})
            for batch in (batch_of(3, 1, 1), batch_of(3, 9, 1)):
                mad.send(batch)
            mad.send(batch_of(4, 0, 1, 4))
            left.send(batch_of(5, 0, 1, 5))
            assert sorted(batch.epoch for batch in collect(right, 2)) == [4, 5]
            other.close()
            mad.close()
        assert not right.poll()


@pytest.mark.parametrize("kind", NETWORK)
@pytest.mark.parametrize("host", ["::1", "localhost"])
def test_hosts_by_name_and_by_ipv6(kind: str, host: str) -> None:
    with Group(kind, 2, host=host) as group:
        left, right = group.open_all(2)
        left.send(batch_of(3, 0, 1))
        assert_all_same(collect(right, 1), [batch_of(3, 0, 1)])


def test_hosts_that_are_not_here() -> None:
    for host in ("192.0.2.1", "no-such-host.invalid"):
        spec = TcpSpec(num_ranks=1, host=host, max_record_bytes=1 << 20, secret="")
        with pytest.raises(ConfigError, match=host):
            open_transport(spec, 0)
        with pytest.raises(ConfigError, match=host):
            create_fabric("distributed", num_ranks=1, num_homes=1, max_record_bytes=1 << 20, host=host)
    with Group("distributed", 1) as group:
        spec = group.spec()
        assert isinstance(spec, DistributedSpec)
        with pytest.raises(ConfigError, match="no-such-host"):
            open_transport(DistributedSpec(**(_fields(spec) | {"host": "no-such-host.invalid"})), 0)


def _fields(spec: DistributedSpec) -> dict[str, object]:
    return {name: getattr(spec, name) for name in spec.__struct_fields__}


def test_workers_that_never_talk_have_no_link() -> None:
    with Group("distributed", 4, num_homes=1) as group:
        ends = group.open_all(4)
        ends[1].send(batch_of(1, 1, 2))  # dropped: there is nothing that it could go through
        ends[1].send(batch_of(1, 1, 0))
        ends[0].send(batch_of(1, 0, 2))
        collect(ends[0], 1)
        assert [batch.src for batch in collect(ends[2], 1)] == [0]

"""Ends of transports on two hosts, and a wire between that is cut, or long: see `tests/network.py`."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.network import HERE, THERE, Network, two_hosts
from tests.transport_group import MOST_TOKENS, PATIENCE_S, Group, batch_of, readable

LINK_TIMEOUT_S = 0.5


@pytest.fixture
def network() -> Iterator[Network]:
    with two_hosts() as network:
        yield network


class Traffic:
    """Batches to the other host (rank 1) and to a worker of this one (rank 2), and what comes back from there."""

    def __init__(self, group: Group, network: Network) -> None:
        (child,) = group.start(1, host=THERE, prefix=network.prefix)
        self.end = group.open(0)
        self.local = group.open(2)
        group.peers[1] = child.open(1)
        group.tell()
        self.sent = 0
        self.answered: list[int] = []
        self.batch = batch_of(MOST_TOKENS // 4, 0, 1)
        self.local_batch = batch_of(1, 2, 0)

    def turn(self) -> None:
        """One batch there; and one from the neighbor here, who must get through whatever the link does."""
        self.batch.epoch = self.sent
        self.end.send(self.batch)
        self.sent += 1
        self.local.send(self.local_batch)
        from_local = 0
        while not from_local:
            assert readable(self.end)
            for batch in self.end.poll():
                if batch.src == 1:
                    self.answered.append(batch.epoch)
                else:
                    from_local += 1

    def go_on(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.turn()
            time.sleep(0.02)

    def go_on_until_answered(self, epoch: int) -> None:
        """Until something is answered that is not older than `epoch`."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.answered or self.answered[-1] < epoch:
            assert time.monotonic() < deadline, (epoch, self.answered[-5:])
            self.turn()
            time.sleep(0.02)


@pytest.mark.parametrize("kind", ["tcp", "distributed"])
def test_a_link_is_cut_and_comes_back(network: Network, kind: str) -> None:
    """Sending never fails or waits, other links do not notice, and what is sent afterwards arrives, in order."""
    with Group(kind, 3, host=HERE, num_homes=1, link_timeout_s=LINK_TIMEOUT_S) as group:
        traffic = Traffic(group, network)
        traffic.go_on_until_answered(20)
        network.cut()
        traffic.go_on(3 * LINK_TIMEOUT_S)
        assert traffic.answered[-1] < traffic.sent - 10
        network.heal()
        traffic.go_on_until_answered(traffic.sent)
        assert traffic.answered == sorted(set(traffic.answered))
        if kind == "distributed":
            assert traffic.answered == list(range(len(traffic.answered)))  # TCP itself has kept all


def test_a_short_cut_loses_nothing(network: Network) -> None:
    with Group("tcp", 3, host=HERE, link_timeout_s=30) as group:
        traffic = Traffic(group, network)
        traffic.go_on_until_answered(5)
        network.cut()
        traffic.go_on(LINK_TIMEOUT_S)
        network.heal()
        traffic.go_on_until_answered(traffic.sent)
        assert traffic.answered == list(range(len(traffic.answered)))


@pytest.mark.parametrize("kind", ["tcp", "distributed"])
def test_a_long_wire_breaks_no_link(network: Network, kind: str) -> None:
    """50 ms each way: nothing is lost, sent twice or out of order."""
    with Group(kind, 3, host=HERE, num_homes=1, link_timeout_s=5) as group:
        traffic = Traffic(group, network)
        traffic.go_on_until_answered(5)
        network.delay(0.05)
        traffic.go_on(0.25)
        traffic.go_on_until_answered(traffic.sent)
        assert traffic.answered == list(range(len(traffic.answered)))

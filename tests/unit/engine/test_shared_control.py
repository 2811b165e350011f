"""Several front ends at one worker: everybody hears of his own requests, and one that goes leaves nothing behind."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from amoe.engine.control import SocketControlPort
from amoe.engine.messages import (
    AbortRequests,
    AddRequest,
    Failed,
    Heartbeat,
    Loading,
    Outputs,
    Stop,
    ToServer,
)
from amoe.engine.shared_control import REQUESTS_PER_FRONT, SharedControlPort
from amoe.stats import WorkerStats
from amoe.types import SamplingParams, SequenceOutput
from tests.unit.engine.control_peer import Peer


@dataclass
class Ends:
    """The worker's port, and the other ends of its sockets."""

    port: SharedControlPort
    parent: Peer
    fronts: list[Peer]


@pytest.fixture
def ends() -> Iterator[Ends]:
    pairs = [socket.socketpair() for _ in range(3)]
    parent, *fronts = (SocketControlPort(theirs) for _, theirs in pairs)
    peers = [Peer(ours) for ours, _ in pairs]
    port = SharedControlPort(parent, fronts)
    yield Ends(port, peers[0], peers[1:])
    port.close()
    for peer in peers:
        peer.close()


def request(front: int, number: int) -> AddRequest:
    return AddRequest(front * REQUESTS_PER_FRONT + number, [1, 2], SamplingParams())


def is_readable(port: SharedControlPort) -> bool:
    return bool(select.select([port.fileno()], [], [], 0)[0])


def test_requests_of_all_front_ends_arrive(ends: Ends) -> None:
    assert not is_readable(ends.port)
    ends.fronts[0].send(request(0, 5))
    ends.fronts[1].send(request(1, 5))
    assert is_readable(ends.port)
    assert ends.port.receive() == [request(0, 5), request(1, 5)]
    assert not is_readable(ends.port)


def test_outputs_go_to_whoever_asked(ends: Ends) -> None:
    outputs = [SequenceOutput(front * REQUESTS_PER_FRONT + 7, [front]) for front in (1, 0, 1)]
    ends.port.send(Outputs(outputs))
    assert ends.fronts[0].receive() == [Outputs([outputs[1]])]
    assert ends.fronts[1].receive() == [Outputs([outputs[0], outputs[2]])]
    assert ends.parent.receive() == []


def test_columns_of_tokens_go_to_whoever_asked(ends: Ends) -> None:
    other = REQUESTS_PER_FRONT
    ends.port.send(Outputs([SequenceOutput(other + 1, [9])], [other + 7, 3, other + 2], [11, 12, 13]))
    assert ends.fronts[0].receive() == [Outputs([], [3], [12])]
    assert ends.fronts[1].receive() == [Outputs([SequenceOutput(other + 1, [9])], [other + 7, other + 2], [11, 13])]


@pytest.mark.parametrize(
    ("message", "parent_hears", "fronts_hear"),
    [
        (Heartbeat(WorkerStats(0, "colocated")), False, True),
        (Failed("a bug", user_error=False), True, True),
        (Loading(1, 2), True, False),
    ],
)
def test_who_hears_what(ends: Ends, message: ToServer, parent_hears: bool, fronts_hear: bool) -> None:
    ends.port.send(message)
    assert (ends.parent.receive() == [message]) == parent_hears
    for front in ends.fronts:
        assert (front.receive() == [message]) == fronts_hear


def test_a_front_end_that_goes_has_its_requests_aborted(ends: Ends) -> None:
    for number in (1, 2):
        ends.fronts[1].send(request(1, number))
    ends.fronts[0].send(request(0, 1))
    ends.port.receive()
    ends.port.send(Outputs([SequenceOutput(REQUESTS_PER_FRONT + 1, [3], finish_reason="stop")]))
    ends.fronts[1].close()
    assert is_readable(ends.port)
    assert ends.port.receive() == [AbortRequests([REQUESTS_PER_FRONT + 2])]
    assert ends.port.receive() == []
    assert not is_readable(ends.port)
    ends.port.send(Outputs([SequenceOutput(REQUESTS_PER_FRONT + 2, [], finish_reason="abort")]))  # nobody hears it
    ends.fronts[0].send(request(0, 2))
    assert ends.port.receive() == [request(0, 2)]


def test_without_the_parent_the_worker_stops(ends: Ends) -> None:
    ends.parent.close()
    assert ends.port.receive() == [Stop()]
    assert ends.port.receive() == []


def test_an_interrupt_stops_it_once(ends: Ends) -> None:
    ends.port.interrupt()
    assert is_readable(ends.port)
    assert ends.port.receive() == [Stop()]
    assert not is_readable(ends.port)

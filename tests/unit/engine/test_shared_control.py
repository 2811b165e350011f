"""Several front ends at one worker: everybody hears of his own requests, and one that goes leaves nothing behind."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator

import pytest

from amoe.engine.control import SocketControlPort
from amoe.engine.messages import (
    AbortRequests,
    AddRequest,
    Alive,
    Applied,
    Failed,
    Heartbeat,
    Loading,
    Outputs,
    Stop,
    Topology,
    ToServer,
)
from amoe.engine.shared_control import REQUESTS_PER_FRONT, SharedControlPort, door_pair, put_through
from amoe.stats import WorkerStats
from amoe.types import SamplingParams, SequenceOutput
from tests.unit.engine.control_peer import Peer


class Ends:
    """The worker's port, and the other ends of its sockets: front ends 0 and 1, and whoever comes through the door."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.door, door = door_pair()
        self.port = SharedControlPort(SocketControlPort(theirs), door)
        self.parent = Peer(ours)
        self.fronts = [self.come(0), self.come(1)]

    def come(self, front: int) -> Peer:
        return Peer(put_through(self.door, front))

    def close(self) -> None:
        self.port.close()
        self.parent.close()
        self.door.close()
        for front in self.fronts:
            front.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    assert ends.port.receive() == []
    yield ends
    ends.close()


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


def test_what_the_parent_has_said_comes_before_what_relies_on_it(ends: Ends) -> None:
    topology = Topology(1, [0], [""], b"", 1)
    ends.fronts[0].send(request(0, 5))
    ends.parent.send(topology)
    ends.fronts[1].send(request(1, 5))
    assert ends.port.receive() == [topology, request(0, 5), request(1, 5)]


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
    ("message", "fronts_hear"),
    [
        (Heartbeat(WorkerStats(0, "colocated")), True),
        (Alive(0.0), True),
        (Failed("a bug", user_error=False), True),
        (Loading(1, 2), False),
        (Applied(1), False),
    ],
)
def test_who_hears_what(ends: Ends, message: ToServer, fronts_hear: bool) -> None:
    ends.port.send(message)
    assert ends.parent.receive() == [message]
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


def test_one_that_comes_in_the_place_of_another_hears_nothing_of_it(ends: Ends) -> None:
    ends.fronts[1].send(request(1, 4))
    ends.port.receive()
    ends.fronts[1].close()
    ends.fronts[1] = ends.come(2)
    ends.fronts[1].send(request(2, 4))
    assert is_readable(ends.port)
    assert [*ends.port.receive(), *ends.port.receive()] == [AbortRequests([REQUESTS_PER_FRONT + 4]), request(2, 4)]
    old, new = (SequenceOutput(front * REQUESTS_PER_FRONT + 4, [7]) for front in (1, 2))
    ends.port.send(Outputs([old, new]))
    assert ends.fronts[1].receive() == [Outputs([new])]


def test_behind_the_door_of_a_worker_that_has_gone_is_the_end(ends: Ends) -> None:
    ends.port.close()
    with put_through(ends.door, 2) as late:
        assert late.recv(1) == b""


def test_without_the_parent_the_worker_stops(ends: Ends) -> None:
    ends.parent.close()
    ends.door.close()
    assert ends.port.receive() == [Stop()]
    assert ends.port.receive() == []
    assert not is_readable(ends.port)


def test_an_interrupt_stops_it_once(ends: Ends) -> None:
    ends.port.interrupt()
    assert is_readable(ends.port)
    assert ends.port.receive() == [Stop()]
    assert not is_readable(ends.port)

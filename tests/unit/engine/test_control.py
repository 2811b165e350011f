"""The control channel: every message arrives, whole and in order, however the stream is cut; the end is told once."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoe.engine.control import (
    MAX_FRAME_BYTES,
    MAX_UNSENT_SIGNS,
    AsyncControlChannel,
    FrameReader,
    SocketControlPort,
    encode_frame,
)
from amoe.engine.messages import (
    AbortRequests,
    AddRequest,
    Failed,
    Heartbeat,
    Loading,
    Outputs,
    Ready,
    Stop,
    ToServer,
    ToWorker,
)
from amoe.errors import TransportError
from amoe.stats import HistogramSnapshot, QueueSnapshot, WorkerStats
from amoe.types import CapacityUsage, SamplingParams, SequenceOutput, TokenLogprobs

ids = st.integers(0, 2**31 - 1)
finite = st.floats(allow_nan=False)
to_worker = st.one_of(
    st.builds(
        AddRequest,
        ids,
        st.lists(ids, max_size=50),
        st.builds(
            SamplingParams,
            max_tokens=st.integers(1, 1000),
            temperature=st.floats(0, 5),
            seed=st.none() | ids,
            stop=st.lists(st.text(min_size=1), max_size=3).map(tuple),
            stop_token_ids=st.lists(ids, max_size=4).map(tuple),
            logprobs=st.none() | st.integers(0, 20),
            ignore_eos=st.booleans(),
        ),
    ),
    st.builds(AbortRequests, st.lists(ids)),
    st.just(Stop()),
)
outputs = st.builds(
    SequenceOutput,
    ids,
    st.lists(ids, max_size=3),
    st.lists(st.builds(TokenLogprobs, finite, st.lists(ids, max_size=3), st.lists(finite, max_size=3)), max_size=3),
    st.sampled_from([None, "stop", "length", "abort", "error"]),
    st.none() | ids,
    ids,
    st.none() | st.builds(CapacityUsage, ids, ids, ids, st.floats(0, 1)),
    st.lists(st.builds(TokenLogprobs, finite, st.lists(ids, max_size=3), st.lists(finite, max_size=3)), max_size=3),
)
to_server = st.one_of(
    st.builds(Loading, ids, ids),
    st.builds(Ready, ids, ids, ids, ids),
    st.builds(Outputs, st.lists(outputs, max_size=3), st.lists(ids, max_size=3), st.lists(ids, max_size=3)),
    st.builds(Failed, st.text(), st.booleans()),
    st.builds(
        Heartbeat,
        st.builds(
            WorkerStats,
            ids,
            st.sampled_from(["attention", "experts", "colocated"]),
            queues=st.lists(st.builds(QueueSnapshot, st.text(), ids, ids, finite), max_size=3),
            batch_sizes=st.lists(st.builds(HistogramSnapshot, st.text(), ids, st.lists(ids), finite), max_size=2),
            expert_pairs=st.lists(st.lists(ids, max_size=3), max_size=3),
        ),
    ),
)


class Ends:
    """A worker's port, and the bare socket at the server's end."""

    def __init__(self) -> None:
        self.server, worker = socket.socketpair()
        self.server.settimeout(30)
        self.port = SocketControlPort(worker)

    def readable(self) -> bool:
        return bool(select.select([self.port.fileno()], [], [], 0)[0])

    def receive(self, count: int) -> list[ToWorker]:
        messages: list[ToWorker] = []
        while len(messages) < count:
            assert select.select([self.port.fileno()], [], [], 30)[0]
            messages += self.port.receive()
        return messages


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.port.close()
    ends.server.close()


def of_size(num_bytes: int) -> AddRequest:
    """A message of about so many bytes."""
    return AddRequest(1, [2**20 + i for i in range(num_bytes // 5)], SamplingParams())


@given(messages=st.lists(to_worker, max_size=8), cuts=st.lists(st.integers(1, 40), min_size=1))
def test_frames_however_the_stream_is_cut(messages: list[ToWorker], cuts: list[int]) -> None:
    stream = b"".join(encode_frame(message) for message in messages)
    reader, bodies, position, turn = FrameReader(), [], 0, 0
    while position < len(stream):
        size = cuts[turn % len(cuts)]
        bodies += reader.feed(stream[position : position + size])
        position, turn = position + size, turn + 1
    assert [b"%b" % body for body in bodies] == [bytes(encode_frame(message)[4:]) for message in messages]


@given(messages=st.lists(to_worker, max_size=8))
def test_to_worker_round_trip(messages: list[ToWorker]) -> None:
    ends = Ends()
    for message in messages:
        ends.server.sendall(encode_frame(message))
    assert ends.port.receive() == messages
    assert ends.port.receive() == []
    ends.port.close()
    ends.server.close()


@given(messages=st.lists(to_server, max_size=8))
def test_to_server_round_trip(messages: list[ToServer]) -> None:
    async def run() -> list[ToServer]:
        ends = Ends()
        channel = await AsyncControlChannel.open(ends.server)
        for message in messages:
            ends.port.send(message)
        ends.port.close()
        received = [message async for message in channel]
        await channel.close()
        return received

    assert asyncio.run(run()) == messages


def test_many_messages_in_one_read(ends: Ends) -> None:
    messages = [AbortRequests([number]) for number in range(2000)]
    ends.server.sendall(b"".join(encode_frame(message) for message in messages))
    assert ends.receive(2000) == messages
    assert not ends.readable()


def test_large_message_in_pieces(ends: Ends) -> None:
    message = of_size(1 << 20)
    frame = encode_frame(message)
    for start in range(0, len(frame), 10_000):
        ends.server.sendall(frame[start : start + 10_000])
        received = ends.port.receive()
    assert received == [message]


def test_unsent_bytes_wake_the_worker_and_go_out_in_order(ends: Ends) -> None:
    """A server that does not read blocks nobody; when it reads, the descriptor wakes the worker to go on sending."""
    messages = [Failed("x" * 100_000 + str(number), False) for number in range(30)]
    for message in messages:
        ends.port.send(message)
    assert not ends.readable()
    expected = b"".join(encode_frame(message) for message in messages)
    received = bytearray()
    while len(received) < len(expected):
        if select.select([ends.server], [], [], 0)[0]:
            received += ends.server.recv(1 << 20)
        else:
            assert select.select([ends.port.fileno()], [], [], 30)[0]
            assert ends.port.receive() == []
    assert received == expected
    assert not ends.readable()


def test_signs_of_life_do_not_pile_up_before_a_server_that_does_not_read(ends: Ends) -> None:
    def send(number: int) -> None:
        ends.port.send(Heartbeat(WorkerStats(0, "attention", number, expert_pairs=[[0] * 50_000])))

    def read_all() -> list[ToServer]:
        bodies = []
        while select.select([ends.server], [], [], 0)[0]:
            bodies += reader.feed(ends.server.recv(1 << 20))
            ends.port.receive()  # sends what the socket takes now
        return [msgspec.msgpack.decode(body, type=ToServer) for body in bodies]

    reader = FrameReader()
    for number in range(10 * MAX_UNSENT_SIGNS):
        send(number)
    ends.port.send(Outputs([SequenceOutput(7, [1])]))  # which somebody waits for
    *signs, last = read_all()
    assert isinstance(last, Outputs)
    numbers = [sign.stats.loops for sign in signs if isinstance(sign, Heartbeat)]
    assert numbers == list(range(len(signs)))
    assert MAX_UNSENT_SIGNS <= len(signs) < 2 * MAX_UNSENT_SIGNS  # some went into the socket at once
    for number in (1000, 1001):  # the server reads again, and hears of life again
        send(number)
        (sign,) = read_all()
        assert isinstance(sign, Heartbeat) and sign.stats.loops == number


def test_end_of_the_server_is_one_stop(ends: Ends) -> None:
    ends.server.sendall(encode_frame(AbortRequests([1])))
    ends.server.close()
    assert ends.readable()
    messages = ends.port.receive() + ends.port.receive()
    assert messages == [AbortRequests([1]), Stop()]
    assert ends.port.receive() == []
    assert not ends.readable()
    ends.port.send(Loading(1, 2))  # to nobody


def test_server_killed_with_unread_messages(ends: Ends) -> None:
    for _ in range(100):
        ends.port.send(Failed("x" * 10_000, False))
    ends.server.close()
    for _ in range(3):
        ends.port.send(Loading(1, 2))
    assert ends.receive(1) == [Stop()]
    assert not ends.readable()


def test_interrupt_is_a_stop(ends: Ends) -> None:
    ends.port.interrupt()
    ends.server.sendall(encode_frame(AbortRequests([1])))
    assert ends.readable()
    assert ends.port.receive() == [AbortRequests([1]), Stop()]
    assert not ends.readable()
    ends.server.close()
    assert ends.port.receive() == []


def test_nonsense_is_an_error(ends: Ends) -> None:
    ends.server.sendall(encode_frame(Loading(1, 2)))
    with pytest.raises(TransportError, match="not a message"):
        ends.port.receive()
    ends.server.sendall(b"\xff" * 8)
    with pytest.raises(TransportError, match="out of step"):
        ends.port.receive()


def test_frame_beyond_the_limit_is_refused() -> None:
    with pytest.raises(TransportError, match="larger"):
        encode_frame(Failed("x" * (MAX_FRAME_BYTES + 1), False))


async def test_channel_sends_and_ends(ends: Ends) -> None:
    channel = await AsyncControlChannel.open(ends.server)
    large = of_size(1 << 20)
    channel.send(large)
    channel.send(Stop())
    received: list[ToWorker] = []
    while len(received) < 2:
        received += ends.port.receive()
        await asyncio.sleep(0)
    assert received == [large, Stop()]
    ends.port.send(Loading(1, 2))
    ends.port.close()
    assert [message async for message in channel] == [Loading(1, 2)]
    with pytest.raises(BrokenPipeError):
        channel.send(Stop())
    await channel.close()
    await channel.close()


async def test_a_channel_that_is_aborted_waits_for_no_reader(ends: Ends) -> None:
    """Its worker's host is cut off: what was on its way never arrives, and what it says is not heard."""
    channel = await AsyncControlChannel.open(ends.server)
    channel.send(of_size(8 << 20))
    ends.port.send(Loading(1, 2))
    channel.abort()
    await asyncio.wait_for(channel.close(), 60)
    assert [message async for message in channel] == []
    with pytest.raises(BrokenPipeError):
        channel.send(Stop())


async def test_channel_survives_cancelled_iteration(ends: Ends) -> None:
    channel = await AsyncControlChannel.open(ends.server)
    messages = [Loading(number, 50) for number in range(50)]
    received: list[ToServer] = []
    for message in messages:
        waiting = asyncio.ensure_future(anext(channel))
        await asyncio.sleep(0)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            received.append(await waiting)  # it had one at hand
        ends.port.send(message)
        if message.done % 7 == 0:
            received.append(await anext(channel))
    ends.port.close()
    received += [message async for message in channel]
    assert received == messages
    await channel.close()


async def test_channel_rejects_nonsense(ends: Ends) -> None:
    channel = await AsyncControlChannel.open(ends.server)
    ends.port.send(Stop())  # type: ignore[arg-type]
    with pytest.raises(TransportError, match="not a message"):
        await anext(channel)
    await channel.close()

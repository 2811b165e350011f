"""Payloads that travel beside their records, on process groups of their own: from device to device, by NCCL.

A pair of workers has two such groups, one per direction, and a stream for each. A device does what is on one stream in
turn, and NCCL what is in one group. With both directions in one, a send that waits for its receiver could stand before
the very receive that the other side's send waits for.

Nothing waits for a device but the threads of a link, and they for one event. All is posted on streams of the link,
which wait until a payload has been computed; the scheduler's stream is never made to wait.

What is left to chance: CUDA does not promise that two streams progress side by side, and a kernel of NCCL's holds its
place on the device until the other side's runs. It gets all the queues that there are (`CUDA_DEVICE_MAX_CONNECTIONS` in
`amoe.cluster.environment`), and each receive is posted as soon as its record is there, a moment after the send.
"""

from __future__ import annotations

import contextlib
import time
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from amoe.transport.distributed_groups import FOREVER, GlooGroups, NcclGroups, break_off
from amoe.transport.wire import Layout, dtype_of

_TAG = 0
_LOOK_S = 0.001


class OwnCopy(NamedTuple):
    """A payload [n, H] that is to be sent: a copy, since the scheduler may reuse the original at once."""

    tensor: torch.Tensor
    ready: torch.cuda.Event | None  # on CUDA: the copy has been made

    @classmethod
    def of(cls, payload: torch.Tensor, device: torch.device) -> OwnCopy:
        """To be made in the scheduler's thread. Does not wait."""
        tensor = payload.to(device, copy=True).contiguous()
        ready = torch.cuda.Event() if tensor.is_cuda else None
        if ready is not None:
            ready.record(torch.cuda.current_stream(device))
        return cls(tensor, ready)


class Sending(NamedTuple):
    """A payload on its way: the work, and what has to stay until it is done."""

    work: Any
    copy: OwnCopy


class _Direction:
    """What goes one way: a group, and on CUDA a stream on which all of it is posted and waited for."""

    def __init__(self, group: Any, own: int, device: torch.device) -> None:
        self._group = group
        self._own = own
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._is_broken = False

    def on_stream(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def send(self, copy: OwnCopy) -> Sending:
        with self.on_stream():
            if self._stream is not None and copy.ready is not None:
                self._stream.wait_event(copy.ready)
            return Sending(self._group.send([copy.tensor], 1 - self._own, _TAG), copy)

    def receive(self, payload: torch.Tensor) -> Any:
        """Have what comes next written to `payload`, which was made on the stream; returns the work."""
        with self.on_stream():
            return self._group.recv([payload], 1 - self._own, _TAG)

    def wait(self, work: Any, timeout_s: float | None = None) -> None:
        """Until `work` is done. It holds up the calling thread alone, and does not spin.

        Raises:
            RuntimeError: the link is broken, or the time is over.
        """
        if self._stream is None:
            work.wait(FOREVER if timeout_s is None else timedelta(seconds=timeout_s))
        else:
            with self.on_stream():
                work.wait()  # has the stream wait, and returns
                done = torch.cuda.Event(blocking=True)
                done.record(self._stream)
            _wait_for(done, timeout_s)
        if self._is_broken:  # the kernels of what has been aborted end, like any others, and have moved nothing
            raise RuntimeError("the payload's link was broken off")

    def break_off(self) -> None:
        """Have all that wait raise RuntimeError, now. Idempotent, from any thread."""
        self._is_broken = True  # before anybody wakes up of it
        break_off(self._group, self._own)


class PayloadGroups:
    """The two groups of one pair, seen from one side.

    Made in a thread of the link, because it waits for the peer.

    Args:
        maker: of groups: NCCL where `device` is of CUDA.
        store: for this pair and this attempt alone.
        own: 0 or 1: which of the two this is.
        device: of the payloads.
        timeout_s: for the peer to join.

    Raises:
        RuntimeError: the peer has not joined, or NCCL does not connect these two devices.
    """

    def __init__(
        self, maker: GlooGroups | NcclGroups, store: dist.Store, own: int, device: torch.device, timeout_s: float
    ) -> None:
        self._device = device
        both = [
            _Direction(maker.make(dist.PrefixStore(f"from{src}", store), own, timeout_s), own, device) for src in (0, 1)
        ]
        self._outgoing, self._incoming = both[own], both[1 - own]
        try:
            for direction in both:  # in the same order on both sides
                self._warm_up(direction, timeout_s)
        except BaseException:
            self.break_off()  # what is posted would wait on the device for ever
            raise

    def send(self, copy: OwnCopy) -> Sending:
        """Begin to send. Does not wait."""
        return self._outgoing.send(copy)

    def wait_sent(self, sending: Sending) -> None:
        """Until the copy is not needed any more.

        Raises:
            RuntimeError: the link is broken.
        """
        self._outgoing.wait(sending.work)

    def receive(self, layout: Layout) -> torch.Tensor:
        """The peer's next payload, [n, H], which belongs to the record of this layout: waits until it has arrived.

        Raises:
            RuntimeError: the link is broken.
        """
        with self._incoming.on_stream():
            payload = torch.empty(layout.n, layout.hidden_size, dtype=dtype_of(layout), device=self._device)
        self._incoming.wait(self._incoming.receive(payload))
        return payload

    def break_off(self) -> None:
        """Have all that wait raise RuntimeError, now. Idempotent, from any thread."""
        for direction in (self._outgoing, self._incoming):
            direction.break_off()

    def _warm_up(self, direction: _Direction, timeout_s: float) -> None:
        """One element: NCCL connects at the first operation, and that must not be the scheduler's."""
        with direction.on_stream():
            element = torch.zeros(1, device=self._device)
        if direction is self._outgoing:
            direction.wait(direction.send(OwnCopy(element, None)).work, timeout_s)
        else:
            direction.wait(direction.receive(element), timeout_s)


def _wait_for(done: torch.cuda.Event, timeout_s: float | None) -> None:
    """Until the device has come to `done`.

    Raises:
        RuntimeError: it has not in time.
    """
    if timeout_s is None:
        done.synchronize()
        return
    deadline = time.monotonic() + timeout_s
    while not done.query():
        if time.monotonic() > deadline:
            raise RuntimeError(f"the peer's device has not answered within {timeout_s:g} s")
        time.sleep(_LOOK_S)


def take_over(payload: torch.Tensor | None) -> None:
    """The calling thread's stream uses `payload` from now on: its memory is not given to others before that is done."""
    if payload is not None and payload.is_cuda:
        payload.record_stream(torch.cuda.current_stream(payload.device))

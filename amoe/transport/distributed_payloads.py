"""Payloads that travel beside their records, on process groups of their own: from device to device, by NCCL.

A pair of workers has two such groups, one per direction. Operations of one group run one after the other on one
stream; with both directions in one group, a send that waits for its receiver could stand before the very receive that
the other side's send waits for.

Nothing waits for a device but the threads of a link, and they for one event. All is posted on streams of the link,
which wait until a payload has been computed; the scheduler's stream is never made to wait.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from amoe.transport.distributed_groups import FOREVER, GlooGroups, NcclGroups, break_off
from amoe.transport.wire import Layout, dtype_of

_TAG = 0


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
        RuntimeError: the peer has not joined.
    """

    def __init__(
        self, maker: GlooGroups | NcclGroups, store: dist.Store, own: int, device: torch.device, timeout_s: float
    ) -> None:
        self._own = own
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        groups = [maker.make(dist.PrefixStore(f"from{src}", store), own, timeout_s) for src in (0, 1)]
        self._outgoing, self._incoming = groups[own], groups[1 - own]
        self._warm_up()

    def send(self, copy: OwnCopy) -> Sending:
        """Begin to send. Does not wait."""
        with self._own_stream():
            if self._stream is not None and copy.ready is not None:
                self._stream.wait_event(copy.ready)
            return Sending(self._outgoing.send([copy.tensor], 1 - self._own, _TAG), copy)

    def wait_sent(self, sending: Sending) -> None:
        """Until the copy is not needed any more.

        Raises:
            RuntimeError: the link is broken.
        """
        self._wait(sending.work)

    def receive(self, layout: Layout) -> torch.Tensor:
        """The peer's next payload, [n, H], which belongs to the record of this layout: waits until it has arrived.

        Raises:
            RuntimeError: the link is broken.
        """
        with self._own_stream():
            payload = torch.empty(layout.n, layout.hidden_size, dtype=dtype_of(layout), device=self._device)
            work = self._incoming.recv([payload], 1 - self._own, _TAG)
        self._wait(work)
        return payload

    def break_off(self) -> None:
        """Have all that wait raise RuntimeError, now."""
        for group in (self._outgoing, self._incoming):
            break_off(group, self._own)

    def _warm_up(self) -> None:
        """One element each way: NCCL connects at the first operation, and that must not be the scheduler's."""
        with self._own_stream():
            element = torch.zeros(1, device=self._device)
        for src in (0, 1):
            with self._own_stream():
                if src == self._own:
                    work = self._outgoing.send([element], 1 - self._own, _TAG)
                else:
                    work = self._incoming.recv([element], 1 - self._own, _TAG)
            self._wait(work)

    def _wait(self, work: Any) -> None:
        """Until `work` is done. It holds up the calling thread alone, and does not spin."""
        if self._stream is None:
            work.wait(FOREVER)
            return
        with self._own_stream():
            work.wait()  # has the stream wait, and returns
            done = torch.cuda.Event(blocking=True)
            done.record(self._stream)
        done.synchronize()

    def _own_stream(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def take_over(payload: torch.Tensor | None) -> None:
    """The calling thread's stream uses `payload` from now on: its memory is not given to others before that is done."""
    if payload is not None and payload.is_cuda:
        payload.record_stream(torch.cuda.current_stream(payload.device))

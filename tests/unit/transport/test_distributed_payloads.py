"""Payloads beside their records, over groups that behave as NCCL's do: what is aborted ends as if it had been done."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist

from amoe.transport.distributed_payloads import OwnCopy, PayloadGroups
from amoe.transport.wire import layout_of
from tests.unit.transport.transport_batches import make_batch

CPU = torch.device("cpu")


class Work:
    """Done, or aborted: nobody can tell which."""

    def __init__(self, is_done: bool) -> None:
        self._ended = threading.Event()
        if is_done:
            self._ended.set()

    def wait(self, timeout: Any = None) -> None:
        if not self._ended.wait(timeout.total_seconds() if timeout is not None else None):
            raise RuntimeError("out of time")

    def abort(self) -> None:
        self._ended.set()


class Group:
    """The peer answers the first `num_answered` operations, and no other."""

    def __init__(self, calls: list[str], receives: threading.Semaphore, name: str, num_answered: int) -> None:
        self._calls = calls
        self._receives = receives
        self._name = name
        self._num_answered = num_answered
        self._works: list[Work] = []

    def name(self) -> str:
        return "nccl"

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Work:
        return self._begin(f"send {self._name}")

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> Work:
        work = self._begin(f"recv {self._name}")
        self._receives.release()
        return work

    def abort(self) -> None:
        self._calls.append(f"abort {self._name}")
        for work in self._works:
            work.abort()

    def _begin(self, call: str) -> Work:
        self._calls.append(call)
        self._works.append(Work(len(self._works) < self._num_answered))
        return self._works[-1]


class Maker:
    """Groups whose peers answer so many operations each."""

    def __init__(self, num_answered: int) -> None:
        self.calls: list[str] = []
        self.receives = threading.Semaphore(0)
        self._num_answered = num_answered
        self._num_made = 0

    def make(self, store: dist.Store, own: int, timeout_s: float) -> Group:
        group = Group(self.calls, self.receives, "01"[self._num_made], self._num_answered)
        self._num_made += 1
        return group


def groups_of(maker: Any, own: int, timeout_s: float = 10) -> PayloadGroups:
    return PayloadGroups(maker, dist.HashStore(), own, CPU, timeout_s)


def test_both_sides_connect_the_directions_in_the_same_order() -> None:
    calls = []
    for own in (0, 1):
        maker = Maker(1)
        groups_of(maker, own)
        calls.append(maker.calls)
    assert calls == [["send 0", "recv 1"], ["recv 0", "send 1"]]


def test_a_payload_that_was_aborted_is_not_taken_for_one() -> None:
    """The thread that waits for it hears of the end of the link, though the work itself ends without an error."""
    maker = Maker(1)
    groups = groups_of(maker, 0)
    sending = groups.send(OwnCopy.of(torch.zeros(3, 8), CPU))
    errors: list[Exception] = []

    def wait(call: Any, *arguments: Any) -> None:
        try:
            call(*arguments)
        except RuntimeError as error:
            errors.append(error)

    layout = layout_of(make_batch(3, src=1, dst=0, hidden_size=8))
    threads = [
        threading.Thread(target=wait, args=(groups.receive, layout)),
        threading.Thread(target=wait, args=(groups.wait_sent, sending)),
    ]
    for thread in threads:
        thread.start()
    assert maker.receives.acquire(timeout=60) and maker.receives.acquire(timeout=60)  # to connect, and this one
    groups.break_off()
    for thread in threads:
        thread.join(60)
    assert [str(error) for error in errors] == ["the payload's link was broken off"] * 2


def test_a_peer_that_dies_while_the_link_is_made_leaves_nothing_waiting() -> None:
    maker = Maker(0)
    with pytest.raises(RuntimeError, match="out of time"):
        groups_of(maker, 0, timeout_s=0.01)
    assert sorted(maker.calls) == ["abort 0", "abort 1", "send 0"]

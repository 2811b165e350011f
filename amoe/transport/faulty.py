"""A transport that misbehaves on purpose: wraps any other and injects faults at the receiving end, for tests.

All faults are off by default. Those of a `FaultPlan` are drawn from one seeded generator, so that a failing run can be
repeated; whole links are cut and slowed down at run time, by calls or by a file. Batches to oneself never suffer:
memory loses nothing.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from amoe.transport.base import Peer, Transport
from amoe.transport.link_faults import LinkFaults, SteeringFile, Timer
from amoe.types import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultPlan:
    """What goes wrong, and how often.

    Attributes:
        seed: the same seed and the same sequence of polls give the same faults.
        delay: probability that a batch is held back for 1 to `max_delay_polls` polls.
        max_delay_polls: at least 1.
        duplicate: probability that a batch is delivered twice.
        drop: probability that a batch is lost.
        keep_order: batches from one peer stay in order: a delayed one holds up those behind it.
    """

    seed: int = 0
    delay: float = 0.0
    max_delay_polls: int = 4
    duplicate: float = 0.0
    drop: float = 0.0
    keep_order: bool = True

    def __post_init__(self) -> None:
        if self.max_delay_polls < 1:
            raise ValueError("max_delay_polls must be at least 1")
        if not all(0.0 <= share <= 1.0 for share in (self.delay, self.duplicate, self.drop)):
            raise ValueError("delay, duplicate and drop are probabilities")


@dataclass(slots=True)
class FaultCounts:
    """How many batches have suffered what."""

    delayed: int = 0
    duplicated: int = 0
    dropped: int = 0
    cut: int = 0


class FaultyTransport:
    """One worker's end over `inner`. See `amoe.transport.base.Transport`.

    Args:
        steered_by: a file that says what is wrong with the links, see `SteeringFile`; all workers may share one.
    """

    def __init__(self, inner: Transport, plan: FaultPlan | None = None, *, steered_by: Path | None = None) -> None:
        self._inner = inner
        self._plan = plan or FaultPlan()
        self._random = random.Random(self._plan.seed)
        self._polls = 0
        self._held: dict[int, deque[tuple[int, Batch]]] = {}  # by source: the poll at which it is due, the batch
        self._cut: set[int] = set()
        self._links = LinkFaults()
        self._steering = None if steered_by is None else SteeringFile(steered_by)
        self._late: dict[int, deque[tuple[float, Batch]]] = {}  # by source: when it is due, the batch
        self.counts = FaultCounts()
        # A held batch must wake its reader as an arriving one would: readable while anything is held.
        self._alarm = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._timer = Timer()
        self._epoll = select.epoll()
        self._epoll.register(self._timer.fd, select.EPOLLIN)
        self._epoll.register(inner.fileno(), select.EPOLLIN)
        self._epoll.register(self._alarm, select.EPOLLIN)

    @property
    def rank(self) -> int:
        return self._inner.rank

    def cut(self, peer: int) -> None:
        """From now on nothing passes between this worker and `peer`, either way, and nobody is told."""
        self._cut.add(peer)

    def heal(self, peer: int) -> None:
        """Undo `cut`. What was lost stays lost."""
        self._cut.discard(peer)

    def set_links(self, links: LinkFaults) -> None:
        """From now on this is wrong with the links. What is late already stays late."""
        self._links = links

    @property
    def address(self) -> str:
        return self._inner.address

    def update(self, peers: Mapping[int, Peer]) -> None:
        self._inner.update(peers)

    def send(self, batch: Batch) -> None:
        self._look(time.monotonic())
        if self._is_cut(batch.dst):
            self.counts.cut += 1
            return
        self._inner.send(batch)

    def poll(self) -> list[Batch]:
        self._polls += 1
        now = time.monotonic()
        self._look(now)
        batches: list[Batch] = []
        for batch in self._inner.poll():
            if batch.src == self.rank:
                batches.append(batch)
            elif not self._is_late(batch, now):
                self._admit(batch, batches)
        self._admit_late(now, batches)
        self._release(batches)
        self._set_alarm(any(self._held.values()))
        return batches

    def flush(self) -> bool:
        return self._inner.flush()

    def fileno(self) -> int:
        return self._epoll.fileno()

    def close(self) -> None:
        if not self._epoll.closed:
            self._epoll.close()
            self._timer.close()
            os.close(self._alarm)
        self._inner.close()

    def _look(self, now: float) -> None:
        if self._steering is not None:
            self._links = self._steering.read(now)

    def _is_cut(self, peer: int) -> bool:
        return peer in self._cut or (peer != self.rank and self._links.is_cut(self.rank, peer))

    def _is_late(self, batch: Batch, now: float) -> bool:
        """Keep `batch` if its link is slow, or if others of its link are late: order is kept."""
        delay_s = self._links.delay_between(self.rank, batch.src)
        late = self._late.get(batch.src)
        if not delay_s and not late:
            return False
        self._late.setdefault(batch.src, deque()).append((now + delay_s, _copy(batch)))
        return True

    def _admit_late(self, now: float, batches: list[Batch]) -> None:
        for late in self._late.values():
            while late and late[0][0] <= now:
                self._admit(late.popleft()[1], batches)
        if self._late:
            self._timer.set(min((late[0][0] for late in self._late.values() if late), default=None))

    def _admit(self, batch: Batch, batches: list[Batch]) -> None:
        """Decide what happens to `batch`, which has just arrived: deliver into `batches`, hold or lose it."""
        plan, draw = self._plan, self._random.random
        if self._is_cut(batch.src):
            self.counts.cut += 1
            return
        if draw() < plan.drop:
            self.counts.dropped += 1
            return
        due = self._polls
        if draw() < plan.delay:
            due += self._random.randint(1, plan.max_delay_polls)
            self.counts.delayed += 1
        held = self._held.setdefault(batch.src, deque())
        if due > self._polls or (held and plan.keep_order):
            batch = _copy(batch)
            held.append((due, batch))
        else:
            batches.append(batch)
        if draw() < plan.duplicate:
            self.counts.duplicated += 1
            held.append((due + self._random.randint(0, plan.max_delay_polls), _copy(batch)))

    def _release(self, batches: list[Batch]) -> None:
        for held in self._held.values():
            if self._plan.keep_order:
                while held and held[0][0] <= self._polls:
                    batches.append(held.popleft()[1])
            else:
                for _ in range(len(held)):
                    due, batch = held.popleft()
                    if due <= self._polls:
                        batches.append(batch)
                    else:
                        held.append((due, batch))

    def _set_alarm(self, on: bool) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._alarm)
        if on:
            os.eventfd_write(self._alarm, 1)


def _copy(batch: Batch) -> Batch:
    """A batch that outlives the poll that brought the original."""
    return replace(
        batch,
        slots=batch.slots.copy(),
        generations=batch.generations.copy(),
        iterations=batch.iterations.copy(),
        expert_ids=batch.expert_ids.copy(),
        expert_weights=batch.expert_weights.copy(),
        payload=None if batch.payload is None else batch.payload.clone(),
    )

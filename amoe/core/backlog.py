"""Backlog in seconds: what waits at a worker, and what a home has heard of it and sent since."""

from __future__ import annotations

import numpy as np

from amoe.core.micro_queue import MicroQueues
from amoe.policy.backlog import OwnerWaits, expected_waits, linear_cost, observe_cost
from amoe.types import BlockKind, BoolArray, Int32Array, Int64Array


class WorkMeter:
    """Seconds of work in the μ-queues of one worker, by the costs of the steps that it has run."""

    def __init__(self, queues: MicroQueues) -> None:
        self._queues = queues
        kinds = np.array([queues.block(index).kind for index in range(len(queues.depth))])
        self._of_kind = {kind: kinds == kind for kind in BlockKind}
        self._sums = {kind: np.zeros(5) for kind in BlockKind}

    def observe(self, kind: BlockKind, rows: int, seconds: float) -> None:
        """A step of a block has taken so long."""
        if rows:
            observe_cost(self._sums[kind], rows, seconds)

    def measure(self) -> tuple[float, float]:
        """(seconds of work that waits, seconds that a row more for the experts adds); the latter is below 0 while no
        step of the experts has run."""
        total, row_s = 0.0, -1.0
        for kind, mask in self._of_kind.items():
            step_cost, row_cost = linear_cost(self._sums[kind])
            depth = self._queues.depth[mask]
            total += float(np.count_nonzero(depth)) * step_cost + float(depth.sum()) * row_cost
            if kind is BlockKind.EXPERTS and self._sums[kind][0] > 0:
                row_s = row_cost
        return total, row_s


class OwnerBacklog:
    """What one home knows of the backlog of D expert workers.

    An answer tells what waited when its step began. Rows that were sent after the answered ones are added to it: some
    of them may have been there already, so that a worker looks busier than it is, by a step's rows at most.

    Args:
        num_slots: token slots of the home.
        slack_s: seconds that a worker may answer after the others.
        telemetry_s: what was told is forgotten after so many seconds.

    Attributes:
        late: [D] see `amoe.policy.backlog.hysteresis`.
    """

    def __init__(self, num_owners: int, num_slots: int, slack_s: float, telemetry_s: float) -> None:
        self._backlog_s = np.zeros(num_owners)
        self._row_s = np.zeros(num_owners)
        self._told_at = np.full(num_owners, -np.inf)
        self._num_sent: Int64Array = np.zeros(num_owners, np.int64)
        self._num_told: Int64Array = np.zeros(num_owners, np.int64)  # of these, when what was answered last was sent
        self._sent_before: Int64Array = np.zeros((num_slots, num_owners), np.int64)
        self._slack_s = np.full(num_owners, slack_s)
        self._telemetry_s = telemetry_s
        self.late: BoolArray = np.zeros(num_owners, np.bool_)

    def hear(self, owner: int, slots: Int32Array, backlog_s: float, row_s: float, now: float) -> None:
        """A worker has told what waits there, with an answer for `slots` [n]. A cost below 0 per row tells nothing."""
        if row_s < 0:
            return
        self._backlog_s[owner], self._row_s[owner] = backlog_s, row_s
        self._told_at[owner] = now
        if len(slots):
            self._num_told[owner] = max(self._num_told[owner], self._sent_before[slots, owner].max())

    def send(self, slots: Int32Array, dispatched: BoolArray) -> None:
        """The tokens in `slots` [n] are on their way to the workers in `dispatched` [n, D]."""
        self._num_sent += dispatched.sum(axis=0)
        self._sent_before[slots] = self._num_sent

    def waits(self, now: float) -> OwnerWaits:
        """What a row that is sent now has to expect."""
        is_known = now - self._told_at <= self._telemetry_s
        told_at = np.where(is_known, self._told_at, now)
        wait_s = expected_waits(self._backlog_s, told_at, self._num_sent - self._num_told, self._row_s, now)
        return OwnerWaits(np.where(is_known, wait_s, 0.0), self._row_s, is_known, self._slack_s)

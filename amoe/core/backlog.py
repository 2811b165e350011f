"""Backlog in seconds: what waits at a worker, and what a home has heard of it and sent since."""

from __future__ import annotations

import numpy as np

from amoe.core.micro_queue import MicroQueues
from amoe.policy.backlog import OwnerWaits, expected_waits, linear_cost, observe_cost
from amoe.types import BlockKind, BoolArray, Int64Array


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
        """(seconds of work that waits, seconds that a row more for the experts adds); the latter is 0 while unknown."""
        total, row_s = 0.0, 0.0
        for kind, mask in self._of_kind.items():
            step_cost, row_cost = linear_cost(self._sums[kind])
            depth = self._queues.depth[mask]
            total += float(np.count_nonzero(depth)) * step_cost + float(depth.sum()) * row_cost
            if kind is BlockKind.EXPERTS:
                row_s = row_cost
        return total, row_s


class OwnerBacklog:
    """What one home knows of the backlog of D expert workers.

    Args:
        slack_s: seconds that a worker may answer after the others.
        telemetry_s: what was told is forgotten after so many seconds.

    Attributes:
        late: [D] see `amoe.policy.backlog.hysteresis`.
    """

    def __init__(self, num_owners: int, slack_s: float, telemetry_s: float) -> None:
        self._backlog_s = np.zeros(num_owners)
        self._row_s = np.zeros(num_owners)
        self._told_at = np.full(num_owners, -np.inf)
        self._rows_since: Int64Array = np.zeros(num_owners, np.int64)
        self._slack_s = np.full(num_owners, slack_s)
        self._telemetry_s = telemetry_s
        self.late: BoolArray = np.zeros(num_owners, np.bool_)

    def hear(self, owner: int, backlog_s: float, row_s: float, now: float) -> None:
        """A worker has told what waits there, with an answer. A cost of 0 per row tells nothing."""
        if row_s <= 0:
            return
        self._backlog_s[owner], self._row_s[owner] = backlog_s, row_s
        self._told_at[owner] = now
        self._rows_since[owner] = 0

    def send(self, rows: Int64Array) -> None:
        """So many rows [D] are on their way."""
        self._rows_since += rows

    def waits(self, now: float) -> OwnerWaits:
        """What a row that is sent now has to expect."""
        is_known = now - self._told_at <= self._telemetry_s
        told_at = np.where(is_known, self._told_at, now)
        wait_s = expected_waits(self._backlog_s, told_at, self._rows_since, self._row_s, now)
        return OwnerWaits(np.where(is_known, wait_s, 0.0), self._row_s, is_known, self._slack_s)

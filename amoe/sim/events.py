"""What happens next: a heap of actions, each at a time."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

Action = Callable[[Any], None]


class EventQueue:
    """Actions in the order of their time; those of one time in the order in which they were scheduled.

    Attributes:
        now: time of the action that runs, in seconds.
        num_done: actions that have run.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.num_done = 0
        self._heap: list[tuple[float, int, Action, Any]] = []
        self._num_scheduled = 0

    def __len__(self) -> int:
        return len(self._heap)

    def at(self, time: float, action: Action, argument: Any = None) -> None:
        """Run `action(argument)` at `time`, which must not lie behind `now`."""
        assert time >= self.now, f"an action at {time} is scheduled at {self.now}"
        self._num_scheduled += 1
        heapq.heappush(self._heap, (time, self._num_scheduled, action, argument))

    def step(self) -> None:
        """Run the next action. The caller has looked whether there is one."""
        self.now, _, action, argument = heapq.heappop(self._heap)
        self.num_done += 1
        action(argument)

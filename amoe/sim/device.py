"""A virtual worker in modelled time: one step after the other, and asleep when nothing is to be done."""

from __future__ import annotations

import math

from amoe.core.steps import BlockStep, ForwardStep
from amoe.sim.config import HostModel
from amoe.sim.events import EventQueue
from amoe.sim.results import WorkerMeter
from amoe.sim.timing import StepTimer, Timeline
from amoe.sim.worker import VirtualWorker

SHORTEST_NAP_S = 1e-5  # a deadline that has passed must not keep time from going on


class Device:
    """Gives a `VirtualWorker` its turns: when a step has ended, when something comes while it is idle, and when the
    core has asked to be woken."""

    def __init__(
        self,
        worker: VirtualWorker,
        events: EventQueue,
        timer: StepTimer,
        host: HostModel,
        timeline: Timeline,
        meter: WorkerMeter,
    ) -> None:
        self.worker = worker
        self.meter = meter
        self._events = events
        self._timer = timer
        self._host = host
        self._timeline = timeline
        self._is_busy = False
        self._turn_at = math.inf  # time of the turn that is scheduled
        self._last_begin = -math.inf
        self._last_end = -math.inf

    def wake(self) -> None:
        """Something has come. A busy worker will find it by itself."""
        if not self._is_busy:
            self._turn_no_later_than(self._events.now)

    def _turn_no_later_than(self, time: float) -> None:
        if time < self._turn_at:
            self._turn_at = time
            self._events.at(time, self._on_time)

    def _on_time(self, _: None) -> None:
        if self._turn_at == self._events.now and not self._is_busy:  # otherwise it came earlier than this
            self._turn()

    def _turn(self) -> None:
        now = self._events.now
        self._turn_at = math.inf
        available = self._timeline.available(now)
        if available > now:
            if available < math.inf:
                self._turn_no_later_than(available)
            return
        step = self.worker.turn(now)
        if step is None:
            self._sleep(now)
            return
        assert not isinstance(step, ForwardStep), "no such schedule is simulated"
        seconds = self._timer.seconds(step, now)
        host_s = self._host.visible(now, self._last_begin, self._last_end)
        begin = now + host_s
        end = self._timeline.finish(begin, seconds)
        self._is_busy = True
        self._last_begin, self._last_end = begin, end
        self.meter.begin(step, begin, seconds, host_s)
        if end < math.inf:
            self._events.at(end, self._on_finish, (step, end - now))

    def _sleep(self, now: float) -> None:
        """Until something comes, or the core wants to look again."""
        deadline = self.worker.core.next_deadline(now)
        if deadline is not None:
            self._turn_no_later_than(max(deadline, now + SHORTEST_NAP_S))

    def _on_finish(self, run: tuple[BlockStep, float]) -> None:
        now, (step, seconds) = self._events.now, run
        self.meter.end(now)
        self.worker.finish(step, now, seconds)  # what it sends to itself is found in the turn that follows
        self._is_busy = False
        self._turn()

"""Requests reach the virtual attention workers: in a closed loop, or by Poisson arrivals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from amoe.policy.admission import WorkerLoad, choose_worker
from amoe.sim.events import EventQueue
from amoe.sim.worker import NewRequest
from amoe.sim.workload import RequestSource, Workload


class LoadGenerator:
    """Sends the requests of a workload.

    Args:
        homes: ranks of the attention workers.
        submit: takes the rank of a home, and the request for it.
    """

    def __init__(
        self,
        workload: Workload,
        source: RequestSource,
        homes: Sequence[int],
        events: EventQueue,
        submit: Callable[[int, NewRequest], None],
    ) -> None:
        self._workload = workload
        self._source = source
        self._homes = tuple(homes)
        self._events = events
        self._submit = submit
        self._open: dict[int, tuple[int, int]] = {}  # home and prompt tokens, by request
        self._loads = dict.fromkeys(homes, (0, 0))  # open requests and their prompt tokens

    def begin(self) -> None:
        """The first requests come now."""
        if self._workload.concurrency is None:
            self._arrive(None)
            return
        for index in range(self._workload.concurrency):
            if not self._source.is_empty:
                self._send(self._homes[index % len(self._homes)])

    def end(self, request_id: int) -> None:
        """A request has ended; in a closed loop its home gets the next."""
        home, num_tokens = self._open.pop(request_id)
        requests, tokens = self._loads[home]
        self._loads[home] = (requests - 1, tokens - num_tokens)
        if self._workload.concurrency is not None and not self._source.is_empty:
            self._send(home)

    @property
    def num_open(self) -> int:
        """Requests that have come and not ended."""
        return len(self._open)

    @property
    def is_over(self) -> bool:
        """All requests have ended, and there will be no more."""
        return self._source.is_empty and not self._open

    def _arrive(self, _: None) -> None:
        if self._source.is_empty:
            return
        self._send(choose_worker([WorkerLoad(home, *load) for home, load in self._loads.items()]))
        self._events.at(self._events.now + self._source.next_gap(), self._arrive)

    def _send(self, home: int) -> None:
        request = self._source.draw()
        num_tokens = len(request.prompt_token_ids)
        requests, tokens = self._loads[home]
        self._loads[home] = (requests + 1, tokens + num_tokens)
        self._open[request.request_id] = (home, num_tokens)
        self._submit(home, request)

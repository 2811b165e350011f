"""Which part of a simulation is measured."""

from __future__ import annotations

from collections.abc import Callable

from amoe.sim.config import SimConfig
from amoe.sim.events import EventQueue


class MeasuredWindow:
    """Opens after the warm-up and closes at the end of the measurement.

    Args:
        on_open: called once, when the warm-up is over.

    Attributes:
        opened_at, closed_at: seconds; `closed_at` is None before the end.
    """

    def __init__(self, config: SimConfig, events: EventQueue, on_open: Callable[[], None]) -> None:
        window, concurrency = config.window, config.workload.concurrency or 0
        self._events = events
        self._on_open = on_open
        self._counts_tokens = window.unit == "iterations"
        scale = concurrency if self._counts_tokens else 1
        self._from, self._until = window.warmup * scale, (window.warmup + window.length) * scale
        self._is_open = False
        self.opened_at = 0.0
        self.closed_at: float | None = None

    def begin(self) -> None:
        """The simulation begins."""
        if self._from == 0:
            self._open(None)
        elif not self._counts_tokens:
            self._events.at(self._from, self._open)
        if not self._counts_tokens and self._until < float("inf"):
            self._events.at(self._until, self._close)

    def _open(self, _: None) -> None:
        self._is_open = True
        self.opened_at = self._events.now
        self._on_open()

    def _close(self, _: None) -> None:
        self.close()

    def close(self) -> None:
        """The measurement ends now. A warm-up that was never over leaves an empty one."""
        if self.closed_at is None:
            self.closed_at = self._events.now
            if not self._is_open:
                self.opened_at = self._events.now

    def count(self, num_tokens: int) -> None:
        """`num_tokens` have been sampled since the beginning."""
        if not self._counts_tokens:
            return
        if not self._is_open and num_tokens >= self._from:
            self._open(None)
        if num_tokens >= self._until:
            self.close()

    def progress(self, num_tokens: int) -> float:
        """Share of the simulation that is done, from 0 to 1; 0 if nobody knows."""
        done = num_tokens if self._counts_tokens else self._events.now
        return min(1.0, done / self._until)

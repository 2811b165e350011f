"""What SIGTERM and SIGINT mean to the process that owns a cluster: the first asks to drain, SIGINT again kills."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_KILLED = 128 + signal.SIGINT


class ShutdownSignals:
    """Signal handlers of an event loop in the main thread.

    Args:
        on_kill: called before the process ends at once, by SIGINT after a first signal: `LocalCluster.kill`.

    Attributes:
        requested: set by the first SIGTERM or SIGINT: drain, then stop.
    """

    def __init__(self, on_kill: Callable[[], None]) -> None:
        self.requested = asyncio.Event()
        self._on_kill = on_kill

    def install(self) -> None:
        """Take the signals over. Call it after anybody else who wants them, a web server for example."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self.handle, number)

    def remove(self) -> None:
        """Give the signals back to their defaults."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.remove_signal_handler(number)

    def handle(self, number: int) -> None:
        """One signal has come; for whoever has to install handlers of their own."""
        if number == signal.SIGINT and self.requested.is_set():
            try:
                self._on_kill()
            finally:
                os._exit(EXIT_KILLED)
        if not self.requested.is_set():
            logger.info("%s: leaving once what is open has ended", signal.Signals(number).name)
        self.requested.set()

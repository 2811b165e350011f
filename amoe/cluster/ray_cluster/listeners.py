"""What listens to the head of a Ray cluster in a driver, for the output of workers and for errors.

While the head does not answer, a thread of Ray's asks again at once, for ever, and holds the interpreter's lock for it:
streams of the server beside it were four times slower and more. Here both threads pause between two questions.
"""

from __future__ import annotations

import time
from typing import Any

from ray import _raylet

PAUSE_S = 0.2  # it also holds up the end of the connection

# Nobody has told the type checker of what is compiled.
_compiled: Any = _raylet
_LogSubscriber: Any = _compiled.GcsLogSubscriber
_ErrorSubscriber: Any = _compiled.GcsErrorSubscriber


class PatientLogSubscriber(_LogSubscriber):
    """Ray's own, but that it takes its time when there is nothing."""

    def poll(self, timeout: float | None = None) -> Any:
        """The next output of workers; without any lines: the head does not answer."""
        found: Any = super().poll(timeout)
        if not found or not found["lines"]:
            time.sleep(PAUSE_S)
        return found


class PatientErrorSubscriber(_ErrorSubscriber):
    """Ray's own, but that it takes its time when there is nothing."""

    def poll(self, timeout: float | None = None) -> Any:
        """The next error, and its number; None for both: the head does not answer."""
        found: Any = super().poll(timeout)
        if found[1] is None:
            time.sleep(PAUSE_S)
        return found


def be_patient() -> None:
    """For drivers of this process that connect from now on: Ray looks for the classes by these names when they do."""
    _compiled.GcsLogSubscriber = PatientLogSubscriber
    _compiled.GcsErrorSubscriber = PatientErrorSubscriber

"""What listens to the head of a Ray cluster in a driver, for the output of workers and for errors.

While the head does not answer, a thread of Ray's asks again at once, for ever, and holds the interpreter's lock for it:
streams of the server beside it were four times slower and more. Here both threads pause between two questions.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from ray import _raylet

logger = logging.getLogger(__name__)

PAUSE_S = 0.2  # it also holds up the end of the connection

# Ray's, by names that it may change: without them it works as well, as long as the head answers.
_LOGS, _ERRORS = "GcsLogSubscriber", "GcsErrorSubscriber"
_LogSubscriber: Any = getattr(_raylet, _LOGS, object)
_ErrorSubscriber: Any = getattr(_raylet, _ERRORS, object)


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
    for name, patient in ((_LOGS, PatientLogSubscriber), (_ERRORS, PatientErrorSubscriber)):
        if hasattr(_raylet, name):
            setattr(_raylet, name, patient)
        else:
            logger.warning("this version of Ray has no %s: while its head is away, it will slow this server down", name)

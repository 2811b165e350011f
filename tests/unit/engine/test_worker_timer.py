"""An idle worker wakes for its heartbeat, and for whoever has waited long enough for another worker."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from amoe.clock import ManualClock
from amoe.engine.worker import Worker


@pytest.mark.parametrize(("deadline", "seconds"), [(None, 0.5), (10.7, 0.5), (10.2, 0.2), (9.0, 0.0)])
def test_the_loop_sleeps_until_the_next_timer(deadline: float | None, seconds: float) -> None:
    core: Any = SimpleNamespace(next_deadline=lambda now: deadline)
    parts: Any = SimpleNamespace()
    worker = Worker(core, None, None, None, transport=parts, control=parts, clock=ManualClock(10.0), stats=parts)
    worker._next_sign = 10.5
    assert worker._seconds_to_sleep(10.0) == pytest.approx(seconds)

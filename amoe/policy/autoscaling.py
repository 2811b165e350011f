"""How many expert workers there should be: one more while tokens wait long for experts, one less while few do much.

A pure step: what was measured, and what the last step remembered, give the number that is wanted and what to remember.

- **Up**, by one, once the queue age of the worst worker has been above `AutoscaleConfig.queue_age_s` for `SUSTAIN_S`.
- **Down**, by one, once the others could have done the work of all with `BUSY_AFTER` of their time, and no queue was
  near the bound, for `IDLE_S`. So a worker that goes does not come back at once: the bound on the way down is about the
  load that the remaining ones will have, not the one that there is.
- After a change nothing is decided for `COOLDOWN_S`: experts are moved meanwhile, and the queues are not yet what the
  new number makes of them.

A larger distance from the bounds is no reason for larger steps: each step moves weights, and the next is seconds away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from amoe.config import AutoscaleConfig

SUSTAIN_S = 3.0
IDLE_S = 60.0
COOLDOWN_S = 10.0
BUSY_AFTER = 0.5  # of the remaining workers' time, above which none is taken away
CALM = 0.25  # of the bound on the queue age, above which none is taken away


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """What one expert worker did since it last spoke.

    Attributes:
        queue_age_s: how long tokens waited for its experts.
        busy: part of its time, in [0, 1], in which experts ran.
    """

    queue_age_s: float
    busy: float


@dataclass(frozen=True, slots=True)
class AutoscaleState:
    """What a step remembers for the next one; all in seconds of the caller's clock.

    Attributes:
        late_since, idle_since: since when there have been too few workers, or too many; None: there are not.
        settled_at: until then nothing is decided.
    """

    late_since: float | None = None
    idle_since: float | None = None
    settled_at: float = 0.0


def wanted_workers(
    config: AutoscaleConfig, state: AutoscaleState, loads: Mapping[int, ExpertLoad], count: int, now: float
) -> tuple[int, AutoscaleState]:
    """How many expert workers there should be.

    Args:
        state: of the last step; `AutoscaleState()` at first.
        loads: by rank, of the expert workers that serve. A number of them other than `count` is one that is being
            replaced: what the others do meanwhile says nothing.
        count: expert workers that there ought to be at the moment.

    Returns:
        The number, which differs from `count` by at most one unless that is out of bounds, and what to remember.
    """
    bounded = min(max(count, config.min_workers), config.max_workers)
    if bounded != count:
        return bounded, AutoscaleState(settled_at=now + COOLDOWN_S)
    if now < state.settled_at or len(loads) != count:
        return count, replace(state, late_since=None, idle_since=None)
    age = max(load.queue_age_s for load in loads.values())
    is_late = age > config.queue_age_s and count < config.max_workers
    is_idle = count > config.min_workers and age < CALM * config.queue_age_s and _fits(loads, count - 1)
    late_since = _since(state.late_since, is_late, now)
    idle_since = _since(state.idle_since, is_idle, now)
    if late_since is not None and now - late_since >= SUSTAIN_S:
        return count + 1, AutoscaleState(settled_at=now + COOLDOWN_S)
    if idle_since is not None and now - idle_since >= IDLE_S:
        return count - 1, AutoscaleState(settled_at=now + COOLDOWN_S)
    return count, replace(state, late_since=late_since, idle_since=idle_since)


def _fits(loads: Mapping[int, ExpertLoad], count: int) -> bool:
    """Whether `count` workers could do what these did."""
    return sum(load.busy for load in loads.values()) <= BUSY_AFTER * count


def _since(since: float | None, holds: bool, now: float) -> float | None:
    return None if not holds else now if since is None else since

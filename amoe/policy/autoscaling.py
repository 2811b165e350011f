"""How many expert workers there should be: one more while tokens wait long for experts, one less while few do much.

The *queue age* of an expert worker is the mean time that a token waits there, at each layer, for others: from its
arrival until its step, while the worker runs another; and in its step, which computes its tokens together, for the
shares of the others. So it tells how much sooner a token would be through if the worker were there for it alone,
whatever the schedule: the strict ones have large steps and hardly a queue, the loose ones queues and small steps. A
lone token waits for nobody, and so does one whose wave waits for tokens that are elsewhere: the worker sleeps then.

A pure step: what was measured, and what the last step remembered, give the number that is wanted and what to remember.

- **Up**, by one, once the queue age of the worst worker has been above the bound for `SUSTAIN_S`. The bound is a number
  of seconds, or by default `AGE_PART` of the *pace*: the time that a layer takes a token, attention and experts, waits
  included. So a fast device is asked for more than a slow one, and nobody is added where tokens wait for attention.
- **Down**, by one, once the queue age would be below `CALM` of the bound, for `IDLE_S`, if the others did the work of
  all: each would take over its part of what the one that goes does, and tokens would wait for whoever had more than
  `BUSY_AFTER` of its time to do. So a worker that goes does not come back at once. A lone token would wait for nobody,
  however long its experts take.
- A step down that was answered by one up within `REGRET_S` was a mistake: the load is one that grows when it is served
  more slowly. Then the next one takes twice as long to be taken, and so on up to `MOST_PATIENCE` times `IDLE_S`.
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
REGRET_S = 120.0
MOST_PATIENCE = 64.0
AGE_PART = 0.5  # of the pace, above which tokens wait too long
CALM = 0.6  # of the bound, above which no worker is taken away
BUSY_AFTER = 0.75  # of a remaining worker's time: what goes beyond it makes tokens wait


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """What one expert worker did since it last spoke.

    Attributes:
        queue_age_s: how long tokens waited there for others, at each layer.
        busy: part of its time, in [0, 1], in which experts ran.
    """

    queue_age_s: float
    busy: float


@dataclass(frozen=True, slots=True)
class Flow:
    """What tokens did lately, at all workers together.

    Attributes:
        pace_s: that a layer took a token; 0: nothing ran.
        in_flight: tokens that were on their way, on the mean over the time.
    """

    pace_s: float = 0.0
    in_flight: float = 0.0


@dataclass(frozen=True, slots=True)
class AutoscaleState:
    """What a step remembers for the next one; all in seconds of the caller's clock.

    Attributes:
        late_since, idle_since: since when there have been too few workers, or too many; None: there are not.
        settled_at: until then nothing is decided.
        shrunk_at: when the last worker was sent away; None: none has been.
        patience: times `IDLE_S` that there have to be too many before one is sent away.
    """

    late_since: float | None = None
    idle_since: float | None = None
    settled_at: float = 0.0
    shrunk_at: float | None = None
    patience: float = 1.0

    def settling(self, until: float) -> AutoscaleState:
        """The same, with nothing to be decided before `until`."""
        return replace(self, late_since=None, idle_since=None, settled_at=until)


def wanted_workers(
    config: AutoscaleConfig,
    state: AutoscaleState,
    loads: Mapping[int, ExpertLoad],
    flow: Flow,
    count: int,
    now: float,
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
        return bounded, state.settling(now + COOLDOWN_S)
    if now < state.settled_at or len(loads) != count:
        return count, replace(state, late_since=None, idle_since=None)
    is_late = count < config.max_workers and _age(loads) > _bound(config, flow.pace_s)
    is_idle = count > config.min_workers and _can_spare_one(config, loads, flow)
    late_since = _since(state.late_since, is_late, now)
    idle_since = _since(state.idle_since, is_idle, now)
    if late_since is not None and now - late_since >= SUSTAIN_S:
        is_regret = state.shrunk_at is not None and now - state.shrunk_at < REGRET_S
        patience = min(2 * state.patience, MOST_PATIENCE) if is_regret else 1.0
        return count + 1, replace(state.settling(now + COOLDOWN_S), patience=patience)
    if idle_since is not None and now - idle_since >= IDLE_S * state.patience:
        return count - 1, replace(state.settling(now + COOLDOWN_S), shrunk_at=now)
    return count, replace(state, late_since=late_since, idle_since=idle_since)


def _age(loads: Mapping[int, ExpertLoad]) -> float:
    """Of the worst worker."""
    return max(load.queue_age_s for load in loads.values())


def _bound(config: AutoscaleConfig, pace_s: float) -> float:
    return AGE_PART * pace_s if config.queue_age_s is None else config.queue_age_s


def _can_spare_one(config: AutoscaleConfig, loads: Mapping[int, ExpertLoad], flow: Flow) -> bool:
    """Whether tokens would not wait long if one less did the work of these."""
    share = len(loads) / (len(loads) - 1)
    age, busy = _age(loads), max(load.busy for load in loads.values())
    others = 1 - 1 / max(1.0, flow.in_flight)
    after = age * share + max(0.0, busy * share - BUSY_AFTER) * others * flow.pace_s
    return after <= CALM * _bound(config, flow.pace_s + after - age)


def _since(since: float | None, holds: bool, now: float) -> float | None:
    return None if not holds else now if since is None else since

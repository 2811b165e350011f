"""How many expert workers there should be: one more while tokens wait long for experts, one less while few do much.

The *queue age* of an expert worker is the mean time that a token waits there, at each layer, for others: from its
arrival until its step, while the worker runs another; and in its step, which computes its tokens together, for the
shares of the others. So it tells how much sooner a token would be through if the worker were there for it alone,
whatever the schedule: the strict ones have large steps and hardly a queue, the loose ones queues and small steps. One
whose wave waits for tokens that are elsewhere waits for nobody here: the worker sleeps then. Tokens of one prompt wait
for one another, but a user does not wait for others by that: with n sequences, 1/n of the wait is taken for a
sequence's own. So a lone user waits for nobody, whatever is asked.

A pure step: what was measured, and what the last step remembered, give the number that is wanted and what to remember.

- **Up**, by one, once the queue age of the worst worker has been above the bound for `SUSTAIN_S`. The bound is a number
  of seconds, or by default `AGE_PART` of the *pace*: the time that a layer takes a token, attention and experts, waits
  included. So a fast device is asked for more than a slow one, and nobody is added where tokens wait for attention.
- **Down**, by one, once the queue age would be below `CALM` of the bound, for `IDLE_S`, if the others did the work of
  all: each would take over its part of what the one that goes does, and tokens would wait for whoever had more than
  `BUSY_AFTER` of its time to do. So a worker that goes does not come back at once. A lone user would wait for nobody,
  however long the experts take.
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
        queue_age_s: how long tokens waited there for others, at each layer, be they of the same sequence or not.
        busy: part of its time, in [0, 1], in which experts ran.
    """

    queue_age_s: float
    busy: float


@dataclass(frozen=True, slots=True)
class Flow:
    """What tokens did lately, at all workers together.

    Attributes:
        home_s: at a layer's attention, on the mean over the tokens; 0: nothing ran.
        away_s: at its experts, on the mean over single tokens and whole parts of prompts alike.
        sequences: that were running.
    """

    home_s: float = 0.0
    away_s: float = 0.0
    sequences: float = 0.0

    def pace_s(self, age_s: float) -> float:
        """How long a layer took a token whose wait for others is `age_s`: prompts come in large steps, and most tokens
        may have been in steps that were longer than the mean."""
        return self.home_s + max(self.away_s, age_s)

    @property
    def others(self) -> float:
        """Part of the tokens that are of other sequences than a token's own, in [0, 1)."""
        return 1 - 1 / max(1.0, self.sequences)


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
    if now < state.settled_at:
        return count, replace(state, late_since=None, idle_since=None)
    bounded = min(max(count, config.min_workers), config.max_workers)
    if bounded != count:
        return bounded, state.settling(now + COOLDOWN_S)
    if len(loads) != count:
        return count, replace(state, late_since=None, idle_since=None)
    age = queue_age(loads, flow)
    is_late = count < config.max_workers and age > _bound(config, flow.pace_s(age))
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


def queue_age(loads: Mapping[int, ExpertLoad], flow: Flow) -> float:
    """Seconds that tokens wait for other sequences at the worst worker, at each layer; 0 without any."""
    return max((load.queue_age_s for load in loads.values()), default=0.0) * flow.others


def _bound(config: AutoscaleConfig, pace_s: float) -> float:
    return AGE_PART * pace_s if config.queue_age_s is None else config.queue_age_s


def _can_spare_one(config: AutoscaleConfig, loads: Mapping[int, ExpertLoad], flow: Flow) -> bool:
    """Whether tokens would not wait long if one less did the work of these."""
    share = len(loads) / (len(loads) - 1)
    age, busy = queue_age(loads, flow), max(load.busy for load in loads.values())
    pace = flow.pace_s(age)
    after = age * share + max(0.0, busy * share - BUSY_AFTER) * flow.others * pace
    return after <= CALM * _bound(config, pace + after - age)


def _since(since: float | None, holds: bool, now: float) -> float | None:
    return None if not holds else now if since is None else since

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
- A step up that leaves tokens waiting as long as before, to within `RELIEF`, was futile: one expert may be hot, and no
  further worker relieves whoever holds it. The worker that was added goes, and none is added to so many workers again
  for the same cause: until there is clearly more to do (`MORE`), or `FUTILE_S` have passed. What is judged is the mean
  since the queues settled; if tokens do not wait too long for `TRIAL_S`, the worker stays. If there are more sequences
  than before the step, they may be why tokens wait, and nothing is concluded.

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
RELIEF = 0.1  # part of the wait that a further worker has to spare tokens to be worth it
MORE = 1.25  # times the sequences, or the wait, for which a worker more was futile, are another cause
TRIAL_S = 60.0
FUTILE_S = 600.0
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
class Trial:
    """A step up that has to prove itself.

    Attributes:
        count: workers before it.
        age_s: queue age before it; sequences: that were running.
        until: when it has proved itself, if tokens do not wait too long by then; None: the queues are not settled yet.
        total_s, steps: sum of the queue ages of the steps since the queues settled, and how many those are.
    """

    count: int
    age_s: float
    sequences: float
    until: float | None = None
    total_s: float = 0.0
    steps: int = 0

    @property
    def age_after_s(self) -> float:
        """Queue age since it."""
        return self.total_s / max(1, self.steps)

    @property
    def is_futile(self) -> bool:
        """Tokens wait as long as they did."""
        return self.age_after_s > (1 - RELIEF) * self.age_s

    def is_over(self, now: float) -> bool:
        """It says nothing any more."""
        return self.until is not None and now > self.until

    def saw(self, age_s: float, now: float) -> Trial | None:
        """The same after a step that found such a queue age; None: it has proved itself."""
        until = now + TRIAL_S if self.until is None else self.until
        seen = replace(self, until=until, total_s=self.total_s + age_s, steps=self.steps + 1)
        return None if self.is_over(now) else seen

    def explains(self, age_s: float, sequences: float) -> bool:
        """What is there now is still what it was tried for."""
        return age_s <= MORE * self.age_s and sequences <= MORE * self.sequences


@dataclass(frozen=True, slots=True)
class AutoscaleState:
    """What a step remembers for the next one; all in seconds of the caller's clock.

    Attributes:
        late_since, idle_since: since when there have been too few workers, or too many; None: there are not.
        settled_at: until then nothing is decided.
        shrunk_at: when the last worker was sent away; None: none has been.
        patience: times `IDLE_S` that there have to be too many before one is sent away.
        late_total_s, late_steps: sum of the queue ages of the steps since `late_since`, and how many those are.
        trial: the last step up, while it has to prove itself; None: it has.
        futile: one that did not, and because of which none is added to as many workers; `until` when.
    """

    late_since: float | None = None
    idle_since: float | None = None
    settled_at: float = 0.0
    shrunk_at: float | None = None
    patience: float = 1.0
    late_total_s: float = 0.0
    late_steps: int = 0
    trial: Trial | None = None
    futile: Trial | None = None

    def settling(self, until: float) -> AutoscaleState:
        """The same, with nothing to be decided before `until`."""
        return replace(self.unmoved(), settled_at=until)

    def unmoved(self) -> AutoscaleState:
        """The same, with all that asks for a change forgotten."""
        return replace(self, late_since=None, idle_since=None, late_total_s=0.0, late_steps=0)

    def saw(self, age_s: float, *, is_late: bool, is_idle: bool, now: float) -> AutoscaleState:
        """The same after a step that found such a queue age, and too few workers, or too many."""
        trial = None if self.trial is None else self.trial.saw(age_s, now)
        futile = self.futile
        return replace(
            self,
            late_since=_since(self.late_since, is_late, now),
            idle_since=_since(self.idle_since, is_idle, now),
            late_total_s=self.late_total_s + age_s if is_late else 0.0,
            late_steps=self.late_steps + 1 if is_late else 0,
            trial=trial,
            futile=None if futile is None or futile.is_over(now) else futile,
        )


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
        return count, state.unmoved()
    bounded = min(max(count, config.min_workers), config.max_workers)
    if bounded != count:
        return bounded, state.settling(now + COOLDOWN_S)
    if len(loads) != count:
        return count, state.unmoved()
    age = queue_age(loads, flow)
    is_late = age > _bound(config, flow.pace_s(age))
    is_idle = count > config.min_workers and _can_spare_one(config, loads, flow)
    state = state.saw(age, is_late=is_late, is_idle=is_idle, now=now)
    if state.late_since is not None and now - state.late_since >= SUSTAIN_S:
        return _when_late(config, state, flow.sequences, count, now)
    if state.idle_since is not None and now - state.idle_since >= IDLE_S * state.patience:
        return count - 1, replace(state.settling(now + COOLDOWN_S), shrunk_at=now, trial=None)
    return count, state


def _when_late(
    config: AutoscaleConfig, state: AutoscaleState, sequences: float, count: int, now: float
) -> tuple[int, AutoscaleState]:
    """One more, or one fewer if the last one was of no use, or as many as there are."""
    age, trial, futile = state.late_total_s / state.late_steps, state.trial, state.futile
    is_on_trial = trial is not None and trial.count == count - 1 >= config.min_workers
    if trial is not None and is_on_trial and trial.is_futile and sequences <= MORE * trial.sequences:
        settled = state.settling(now + COOLDOWN_S)
        return count - 1, replace(settled, trial=None, futile=replace(trial, until=now + FUTILE_S))
    is_in_vain = futile is not None and count >= futile.count and futile.explains(age, sequences)
    if is_in_vain or count == config.max_workers:
        return count, state.unmoved()  # the next `SUSTAIN_S` are looked at by themselves
    is_regret = state.shrunk_at is not None and now - state.shrunk_at < REGRET_S
    patience = min(2 * state.patience, MOST_PATIENCE) if is_regret else 1.0
    settled = state.settling(now + COOLDOWN_S)
    return count + 1, replace(settled, patience=patience, trial=Trial(count, age, sequences), futile=None)


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

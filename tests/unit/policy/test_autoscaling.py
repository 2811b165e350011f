"""Scaling by queue age: within bounds, one at a time, never to and fro."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from amoe.config import AutoscaleConfig
from amoe.policy.autoscaling import (
    COOLDOWN_S,
    FUTILE_S,
    IDLE_S,
    MORE,
    REGRET_S,
    RELIEF,
    SUSTAIN_S,
    TRIAL_S,
    AutoscaleState,
    ExpertLoad,
    Flow,
    wanted_workers,
)

RELATIVE = AutoscaleConfig(min_workers=1, max_workers=4)
ABSOLUTE = replace(RELATIVE, queue_age_s=0.2)
PACE_S = 0.4  # so that both bounds are the same
LATE = ExpertLoad(0.5, 1.0)
FINE = ExpertLoad(0.1, 0.7)
IDLE = ExpertLoad(0.0, 0.01)

CONFIGS = pytest.mark.parametrize("config", [RELATIVE, ABSOLUTE], ids=["relative", "absolute"])
LOADS = st.builds(ExpertLoad, st.floats(0, 2), st.floats(0, 1))


class Run:
    """Steps of half a second, as `amoe.cluster.autoscaler` takes them."""

    def __init__(self, count: int, config: AutoscaleConfig = RELATIVE) -> None:
        self.config, self.count, self.now = config, count, 100.0
        self.state = AutoscaleState()
        self.changes: list[tuple[float, int]] = []

    def step(
        self,
        *loads: ExpertLoad,
        pace_s: float = PACE_S,
        home_s: float = 0.0,
        sequences: float = 64.0,
        seconds: float = 0.5,
    ) -> int:
        self.now += seconds
        by_rank = dict(enumerate(loads))
        wanted, self.state = wanted_workers(
            self.config, self.state, by_rank, Flow(home_s, pace_s, sequences), self.count, self.now
        )
        if wanted != self.count:
            self.changes.append((self.now, wanted - self.count))
        self.count = wanted
        return wanted

    def go_on(self, load: ExpertLoad, seconds: float, pace_s: float = PACE_S) -> int:
        for _ in range(round(seconds / 0.5)):
            self.step(*[load] * self.count, pace_s=pace_s)
        return self.count


@CONFIGS
def test_a_queue_that_stays_old_asks_for_one_more(config):
    run = Run(1, config)
    assert run.go_on(LATE, SUSTAIN_S) == 1
    assert run.step(LATE) == 2


@CONFIGS
def test_a_moment_does_not(config):
    run = Run(1, config)
    for _ in range(20):
        run.go_on(LATE, SUSTAIN_S - 0.5)
        run.step(FINE)
    assert run.changes == []


def test_after_a_change_that_failed_there_is_a_pause_even_out_of_bounds():
    state = AutoscaleState().settling(130.0)
    for now, wanted in ((100.0, 7), (129.0, 7), (130.0, 4)):
        assert wanted_workers(RELATIVE, state, {}, Flow(), 7, now)[0] == wanted


def test_the_worst_worker_counts():
    run = Run(2)
    for _ in range(10):
        run.step(IDLE, LATE)
    assert run.count == 3


def test_without_a_number_of_seconds_the_pace_is_the_measure():
    """The same wait is long where a layer takes 0.6 s, and short where attention takes a second of it."""
    assert Run(1).go_on(LATE, 2 * SUSTAIN_S, pace_s=0.6) == 2
    assert Run(1).go_on(LATE, 10 * SUSTAIN_S, pace_s=1.6) == 1
    assert Run(1, ABSOLUTE).go_on(LATE, 2 * SUSTAIN_S, pace_s=1.6) == 2


def test_tokens_that_wait_longer_than_the_mean_are_none_the_less_tokens_that_wait():
    """Prompts: most tokens are in a few long steps."""
    flow = Flow(0.3, 0.1, 8.0)
    assert (flow.pace_s(0.05), flow.pace_s(0.2)) == (pytest.approx(0.4), pytest.approx(0.5))


def test_load_that_stays_goes_up_to_the_bound_with_a_pause_between():
    run = Run(1)
    for _ in range(240):
        each = ExpertLoad(0.9 / run.count**0.5, 1.0)  # never under the bound
        run.step(*[each] * run.count)
    assert run.count == RELATIVE.max_workers
    times = [at for at, _ in run.changes]
    assert all(b - a >= COOLDOWN_S for a, b in itertools.pairwise(times))


def hot(run: Run, seconds: float, age_s: float = 0.5, sequences: float = 64.0) -> list[int]:
    """One worker holds a hot expert, whatever the others do. Returns the changes in that time."""
    before = len(run.changes)
    for _ in range(round(seconds / 0.5)):
        run.step(ExpertLoad(age_s, 1.0), *[FINE] * (run.count - 1), sequences=sequences)
    return [change for _, change in run.changes[before:]]


@CONFIGS
def test_a_worker_that_brought_nothing_goes_and_no_other_comes_for_the_same_cause(config):
    run = Run(1, config)
    assert hot(run, 2 * SUSTAIN_S) == [1]
    assert hot(run, COOLDOWN_S + 2 * SUSTAIN_S) == [-1]
    assert run.state.futile.age_s == run.state.futile.age_after_s == pytest.approx(0.5 * 63 / 64)
    assert hot(run, FUTILE_S - 20) == []
    assert hot(run, 2 * SUSTAIN_S + 20) == [1], "things may have changed by now"


@CONFIGS
@pytest.mark.parametrize("cause", [{"sequences": 64 * MORE + 1}, {"age_s": 0.5 * MORE + 0.01}])
def test_for_another_cause_one_comes_again(config, cause):
    run = Run(1, config)
    assert hot(run, COOLDOWN_S + 4 * SUSTAIN_S) == [1, -1]
    assert hot(run, 120) == []
    assert hot(run, 3 * SUSTAIN_S, **cause) == [1]


def test_even_the_last_one_allowed_has_to_prove_itself():
    run = Run(RELATIVE.max_workers - 1)
    assert hot(run, COOLDOWN_S + 4 * SUSTAIN_S) == [1, -1]


def test_who_brought_a_little_stays_and_who_is_missed_later_stays_too():
    run = Run(1)
    assert hot(run, 2 * SUSTAIN_S) == [1]
    assert hot(run, COOLDOWN_S + 2 * SUSTAIN_S, age_s=0.5 * (1 - RELIEF) - 0.01) == [1]
    run = Run(1)
    assert hot(run, 2 * SUSTAIN_S) == [1]
    assert hot(run, COOLDOWN_S + TRIAL_S + 2, age_s=0.1) == []
    assert hot(run, 2 * SUSTAIN_S) == [1]


def test_more_sequences_may_be_why_tokens_wait_as_long_as_before():
    run = Run(1)
    assert hot(run, 2 * SUSTAIN_S) == [1]
    assert hot(run, COOLDOWN_S + 2 * SUSTAIN_S, sequences=64 * MORE + 1) == [1]


def test_a_change_that_took_long_leaves_the_trial_its_time():
    """The shell puts off the settling by as long as the change took."""
    run = Run(1)
    assert hot(run, 2 * SUSTAIN_S) == [1]
    run.state = run.state.settling(run.now + 300)
    assert hot(run, 300 + 2 * SUSTAIN_S) == [-1]


@CONFIGS
@pytest.mark.parametrize("pace_s", [PACE_S, 0.0])  # 0: nothing runs at all
def test_idle_workers_go_one_by_one(config, pace_s):
    run = Run(4, config)
    assert run.go_on(IDLE, IDLE_S + 1, pace_s) == 3
    assert run.go_on(IDLE, 5 * IDLE_S, pace_s) == RELATIVE.min_workers


@CONFIGS
def test_none_goes_whose_work_the_others_could_not_do(config):
    run = Run(2, config)
    assert run.go_on(ExpertLoad(0.01, 0.6), 10 * IDLE_S) == 2  # 1.2 would be left to one
    assert run.go_on(ExpertLoad(0.09, 0.1), 10 * IDLE_S) == 2  # tokens would wait twice as long
    assert run.go_on(ExpertLoad(0.01, 0.3), 10 * IDLE_S) == 1


@CONFIGS
def test_a_lone_user_needs_no_more_than_one_worker(config):
    """However long the experts take, and however long the tokens of a prompt wait for one another."""
    alone = ExpertLoad(3.0, 0.9)
    for count in (1, 2):
        run = Run(count, config)
        for _ in range(200):
            run.step(*[alone] * run.count, sequences=1.0)
        assert run.count == 1


def test_a_hot_worker_keeps_the_idle_ones():
    run = Run(3)
    for _ in range(1000):
        run.step(ExpertLoad(0.05, 0.7), *[IDLE] * (run.count - 1))
    assert run.count == 3


def test_while_one_is_being_replaced_nothing_is_decided():
    run = Run(2)
    for _ in range(400):
        run.step(LATE)
    assert run.changes == []


def test_a_number_out_of_bounds_is_brought_back():
    assert Run(7).step(*[FINE] * 7) == 4
    assert Run(1, AutoscaleConfig(min_workers=2, max_workers=3)).step(FINE) == 2


@CONFIGS
@given(
    count=st.integers(1, 4),
    steps=st.lists(
        st.tuples(st.lists(LOADS, min_size=4, max_size=4), st.floats(0, 4), st.floats(0.1, 20)), max_size=60
    ),
)
def test_always_within_bounds_and_by_one_with_pauses(config, count, steps):
    run = Run(count, config)
    for loads, pace_s, seconds in steps:
        before = run.count
        after = run.step(*loads[:before], pace_s=pace_s, seconds=seconds)
        assert config.min_workers <= after <= config.max_workers and abs(after - before) <= 1
    times = [at for at, _ in run.changes]
    assert all(b - a >= COOLDOWN_S for a, b in itertools.pairwise(times))


@CONFIGS
@given(
    loads=st.lists(LOADS, min_size=2, max_size=2),
    more=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=2),
    pace_s=st.floats(0, 4),
)
def test_more_load_never_asks_for_fewer_workers(config, loads, more, pace_s):
    heavier = [
        ExpertLoad(load.queue_age_s + age, min(1.0, load.busy + busy))
        for load, (age, busy) in zip(loads, more, strict=True)
    ]
    wanted = []
    for each in (loads, heavier):
        run = Run(2, config)
        while not run.changes and run.now < 100.0 + 2 * IDLE_S:
            run.step(*each, pace_s=pace_s)
        wanted.append(run.count)
    assert wanted[0] <= wanted[1]


@dataclass(frozen=True)
class Loop:
    """Sequences that go round between attention and experts: a step of experts takes a fixed time, a part that workers
    share (weights that are read), and one per token that they share as well.

    Attributes:
        sequences: in flight; with `rate` the number that so many tokens per second lead to, up to so many.
        num_waves: among which they are split; 1 is lockstep, many are full asynchrony.
        skew: load of the hottest of several workers, relative to an even share.
    """

    sequences: int
    num_waves: int
    attention_s: float
    fixed_s: float
    reading_s: float
    token_s: float
    skew: float
    rate: float | None = None

    def passes(self, count: int) -> tuple[list[ExpertLoad], Flow]:
        """What `count` workers show."""
        sequences = float(self.sequences)
        if self.rate is not None:
            sequences = 1.0
            while sequences < self.sequences and self.rate * self._cycle(sequences, count)[1] > sequences:
                sequences *= 1.05
        waves = min(self.num_waves, max(1, int(sequences)))
        step, cycle = self._cycle(sequences, count)
        others = 1 - waves / sequences
        queued = max(0.0, cycle - step - self.attention_s)
        worst = ExpertLoad(step * others + queued, min(1.0, waves * step / cycle))
        mild = ExpertLoad(worst.queue_age_s / 2, worst.busy / 2)
        return [worst] + [mild] * (count - 1), Flow(self.attention_s, cycle - self.attention_s, sequences)

    def _cycle(self, sequences: float, count: int) -> tuple[float, float]:
        waves = min(self.num_waves, max(1, int(sequences)))
        hot = self.skew if count > 1 else 1.0
        step = self.fixed_s + hot * (self.reading_s + self.token_s * sequences / waves) / count
        return step, max(step + self.attention_s, waves * step)


CLOSED = st.builds(
    Loop,
    sequences=st.integers(1, 300),
    num_waves=st.sampled_from([1, 2, 4, 16]),
    attention_s=st.floats(1e-3, 1),
    fixed_s=st.floats(0, 0.1),
    reading_s=st.floats(0, 1),
    token_s=st.floats(0, 0.1),
    skew=st.floats(1, 1.25),
)
OPEN = st.builds(replace, CLOSED, rate=st.floats(0.1, 1000))


def directions(config: AutoscaleConfig, loop: Loop, count: int, seconds: int) -> list[int]:
    """Of the changes that a load brings which is always the same."""
    run = Run(count, config)
    shown = {number: loop.passes(number) for number in range(1, 5)}
    for _ in range(seconds):
        loads, flow = shown[run.count]
        run.step(*loads, home_s=flow.home_s, pace_s=flow.away_s, sequences=flow.sequences, seconds=1.0)
    return [change for _, change in run.changes]


@CONFIGS
@settings(max_examples=200)
@given(loop=CLOSED, count=st.integers(1, 4))
def test_a_load_that_does_not_change_is_not_answered_to_and_fro(config, loop, count):
    """But for one worker more that brought nothing, and went."""
    changes = directions(config, loop, count, 400)
    assert len(set(changes)) <= 1 or changes == [1] * (len(changes) - 1) + [-1]


@CONFIGS
@settings(max_examples=50)
@example(loop=Loop(2, 1, attention_s=0.5, fixed_s=0.0, reading_s=1.0, token_s=0.0, skew=1.0, rate=1.0), count=1)
@given(loop=OPEN, count=st.integers(1, 4))
def test_a_load_that_grows_when_it_is_served_slowly_is_soon_left_alone(config, loop, count):
    """Its sequences are in flight for longer then, so that there are more of them. In half an hour: 1 + 2 + 4 + 8 + 16
    minutes, each with a worker sent away too soon."""
    most = RELATIVE.max_workers - 1 + 5 + 1800 / FUTILE_S
    assert directions(config, loop, count, 1800).count(-1) <= most


def test_after_a_mistake_there_is_more_patience_until_the_load_is_another():
    """Too many at two workers, too few at one; then the load changes, and comes back."""
    run = Run(2)

    def seconds_until_shrunk() -> float:
        since = run.now
        while run.count == 2:
            run.step(IDLE, IDLE)
        while run.count == 1:
            run.step(LATE)
        return run.changes[-2][0] - since

    waits = [seconds_until_shrunk() for _ in range(4)]
    assert [round((wait - COOLDOWN_S) / IDLE_S) for wait in waits] == [1, 2, 4, 8]
    while run.count == 2:
        run.step(IDLE, IDLE)
    run.go_on(FINE, REGRET_S)
    while run.count == 1:
        run.step(LATE)
    assert seconds_until_shrunk() <= COOLDOWN_S + IDLE_S + 1

"""Which options to try, in which order, and which of them to recommend.

Nothing here runs anything: a search hands batches of `Job` to `run`, which may use several processes, and answers with
a `Plan`. Colocated placements are tried with every number of redundant experts, disaggregated ones with the ratios that
would be the best if all were in perfect balance. Then what follows from the best: its neighbours in the number of
waves, lockstep schedules with its replicas, other loads, fewer devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from amoe.errors import ConfigError
from amoe.sim.flow.bound import bound
from amoe.sim.flow.systems import WAVE_COUNTS, WAVES
from amoe.sim.plan_options import Space, all_options, loads_of, no_room, promising
from amoe.sim.planner import (
    SCHEDULES,
    Evaluator,
    Option,
    Outcome,
    Scenario,
    is_possible,
    least_devices,
    most_sequences,
    prefill_seconds,
    sequences_in_flight,
    weight_bytes,
)

NUM_SPLITS = 3  # ratios of attention to experts that are simulated
NUM_FEWER_SPLITS = 1  # and on fewer devices
ABOUT = 0.01  # relative: of two that differ by less, the simpler one is taken
PIVOT = 256  # of them, at which placements are compared


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """What is wanted: a load (sequences in a closed loop, or requests per second; neither: a sweep), and a latency.

    Attributes:
        slo_itl: seconds, for the p99.
    """

    sequences: int | None = None
    rate: float | None = None
    slo_itl: float | None = None

    def __post_init__(self) -> None:
        if self.sequences is not None and self.rate is not None:
            raise ConfigError("a plan is for a number of sequences or for a rate of requests, not for both")
        for name, value in (("sequences", self.sequences), ("the rate", self.rate), ("the SLO", self.slo_itl)):
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name} must be finite and greater than 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """An option at a load: `sequences` in a closed loop, or at `rate` requests per second beginning with a guess."""

    option: Option
    sequences: int
    rate: float | None = None

    def run(self, evaluator: Evaluator) -> Outcome:
        """The only thing that takes time."""
        if self.rate is None:
            return evaluator.closed(self.option, self.sequences)
        return evaluator.at_rate(self.option, self.rate, self.sequences)


Runner = Callable[[str, Sequence[Job]], list[Outcome]]
"""run(title, jobs): outcomes in the order of the jobs."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a search has found.

    Attributes:
        outcomes: one per alternative, at the load that was asked for, or (sweep) the best load of each.
        refused: alternatives that have no room, with the reason.
        points: all that was simulated at other loads, by alternative.
        best: of `outcomes`, what is recommended; None: no alternative keeps up and meets the SLO.
    """

    goal: Goal
    outcomes: tuple[Outcome, ...]
    refused: tuple[tuple[Option, str], ...]
    points: tuple[Outcome, ...]
    best: Outcome | None

    @property
    def nearest(self) -> Outcome:
        """`best`, or what comes closest to it."""
        if self.best is not None:
            return self.best
        own = [outcome for outcome in self.outcomes if outcome.option.schedule == WAVES.name]
        sustained = [outcome for outcome in own if outcome.sustained]
        if sustained:
            return min(sustained, key=lambda outcome: outcome.p99_itl)
        return max(own, key=lambda outcome: outcome.throughput)


def search(scenario: Scenario, num_devices: int, goal: Goal, space: Space, run: Runner) -> Plan:
    """Find the best deployment.

    Raises:
        ConfigError: no placement has room for weights and load.
    """
    found = _Search(scenario, num_devices, goal, space, run)
    found.place()
    if goal.rate is not None and goal.slo_itl is not None and found.best() is not None:
        found.use_fewer()
    found.vary()
    if found.is_sweep or space.curves:
        found.sweep()
    return found.plan()


class _Search:
    """Steps of a search, and what they have found so far."""

    def __init__(self, scenario: Scenario, num_devices: int, goal: Goal, space: Space, run: Runner) -> None:
        self._scenario, self._num_devices, self._goal, self._space = scenario, num_devices, goal, space
        self._run = run
        self._outcomes: list[Outcome] = []
        self._points: list[Outcome] = []
        self._refused: list[tuple[Option, str]] = []
        self.is_sweep = goal.sequences is None and goal.rate is None

    def place(self) -> None:
        """Colocated with every number of replicas; the most promising ratios, and the best of them likewise."""
        scenario, num_devices = self._scenario, self._num_devices
        wanted = self._goal.sequences or 1
        tried = all_options(scenario, num_devices, self._space)
        if num_devices > scenario.sizes.num_experts and self._space.colocated:  # the others would have no expert
            tried += all_options(scenario, scenario.sizes.num_experts, replace(self._space, disaggregated=False))
        fitting = [option for option in tried if self._admit(option)]
        if not fitting:
            raise ConfigError(no_room(scenario, num_devices, wanted))
        fitting = promising(scenario, fitting, num_devices, NUM_SPLITS, self._typical(num_devices))
        least = {split: min(o.redundant for o in fitting if o.attention_devices == split) for split in _splits(fitting)}
        first = [o for o in fitting if not o.attention_devices or o.redundant == least[o.attention_devices]]
        self._outcomes += self._run("placements", self._jobs(first))
        apart = [outcome for outcome in self._outcomes if outcome.option.attention_devices]
        if apart:
            split = max(apart, key=self._rank).option.attention_devices
            rest = [o for o in fitting if o.attention_devices == split and o not in first]
            self._outcomes += self._run("replicas", self._jobs(rest))

    def use_fewer(self) -> None:
        """The fewest devices that still keep up and meet the SLO, by halving the interval: more never do worse."""
        best = self._nearest().option
        low, high = self._fewest_by_bound(), best.num_devices
        least = min((number for number in self._space.redundant if number), default=0)
        space = replace(self._space, redundant=tuple(sorted({self._space.redundant[0], best.redundant or least})))
        while low < high:
            middle = (low + high) // 2
            options = [option for option in all_options(self._scenario, middle, space) if not self._refusal(option)]
            options = promising(self._scenario, options, self._num_devices, NUM_FEWER_SPLITS, self._typical(middle))
            outcomes = self._run(f"{middle} devices", self._jobs(options)) if options else []
            self._outcomes += outcomes
            if any(outcome.meets(self._goal.slo_itl) for outcome in outcomes):
                high = middle
            else:
                low = middle + 1

    def vary(self) -> None:
        """Numbers of waves next to the best, and lockstep with the replicas of the best, on the same devices."""
        best = self._nearest()
        options: list[Option] = []
        if self._space.waves is None:
            around = [waves for waves in WAVE_COUNTS if abs(WAVE_COUNTS.index(waves) - _index(best.waves)) == 1]
            options += [replace(best.option, waves=waves) for waves in around]
        lockstep = [self._lockstep(name, best.option) for name in self._space.lockstep]
        options += [option for option in lockstep if option.redundant or SCHEDULES[option.schedule].replicas == "none"]
        self._outcomes += self._run("variations", self._jobs([option for option in options if self._admit(option)]))

    def _lockstep(self, name: str, best: Option) -> Option:
        """On the devices of `best`, with as many replicas where the schedule has any, and apart where it must be."""
        system = SCHEDULES[name]
        least = min((number for number in self._space.redundant if number), default=0)
        redundant = (best.redundant or least) if system.replicas != "none" else 0
        split = 0 if system.attention_devices == 0 else self._best_split(best.num_devices)
        return Option(num_devices=best.num_devices, attention_devices=split, redundant=redundant, schedule=name)

    def sweep(self) -> None:
        """Other loads of the best of each kind; for each, what is best within the SLO becomes its outcome."""
        kept = self._kept()
        jobs = []
        for outcome in kept:
            option = replace(outcome.option, waves=self._space.waves)
            jobs += [
                Job(option=option, sequences=sequences)
                for sequences in loads_of(self._scenario, option)
                if sequences != outcome.sequences
            ]
        self._points += [*self._outcomes, *self._run("loads", jobs)]
        if not self.is_sweep:
            return
        if self._goal.slo_itl is not None:
            within = [sequences_within(self._of(outcome.option), self._goal.slo_itl) for outcome in kept]
            pairs = zip(kept, within, strict=True)
            jobs = [Job(option=kept.option, sequences=sequences) for kept, sequences in pairs if sequences]
            self._points += self._run("within the SLO", jobs)
        ranked = [max(self._of(outcome.option), key=self._rank) for outcome in kept]
        self._outcomes = ranked

    def plan(self) -> Plan:
        """All of it."""
        outcomes = sorted(self._outcomes, key=lambda outcome: outcome.option.num_devices)
        points = sorted(self._points, key=lambda outcome: outcome.sequences)
        return Plan(
            goal=self._goal,
            outcomes=tuple(outcomes),
            refused=tuple(self._refused),
            points=tuple(points),
            best=self.best(),
        )

    def best(self) -> Outcome | None:
        """Of the schedule `waves`, what is recommended so far."""
        return recommend(self._outcomes, self._goal)

    def _nearest(self) -> Outcome:
        plan = Plan(goal=self._goal, outcomes=tuple(self._outcomes), refused=(), points=(), best=self.best())
        return plan.nearest

    def _rank(self, outcome: Outcome) -> tuple[bool, float]:
        return outcome.meets(self._goal.slo_itl), outcome.throughput

    def _of(self, option: Option) -> list[Outcome]:
        """Points of an option over load, whatever the waves."""
        same = replace(option, waves=None)
        return [outcome for outcome in self._points if replace(outcome.option, waves=None) == same]

    def _jobs(self, options: Sequence[Option]) -> list[Job]:
        jobs = []
        for option in options:
            most = most_sequences(self._scenario, option)
            typical = self._goal.sequences or self._typical(option.num_devices)
            sequences = min(most, max(option.num_homes, typical))
            jobs.append(Job(option=option, sequences=sequences, rate=self._goal.rate))
        return jobs

    def _typical(self, num_devices: int) -> int:
        """Sequences in flight, about."""
        if self._goal.sequences is not None:
            return self._goal.sequences
        if self._goal.rate is None:
            return PIVOT * num_devices
        return int(1.3 * (self._by_bound(num_devices)[0] or PIVOT * num_devices))

    def _by_bound(self, num_devices: int) -> tuple[int | None, float]:
        """Sequences in flight at the rate, and seconds between tokens, if no schedule could do better."""
        scenario = self._scenario
        evaluator, option = Evaluator(scenario, self._num_devices), Option(num_devices=num_devices)

        def itl(sequences: int) -> float:
            deployment = evaluator.deployment(option, sequences)
            prefill = prefill_seconds(scenario, option, deployment.slowdown) / scenario.output_len
            return bound(deployment, scenario.popularity).seconds + sequences * prefill

        offered = (self._goal.rate or 0.0) * scenario.output_len
        count = sequences_in_flight(offered, itl, least=num_devices, most=num_devices << 16)
        return count, itl(count) if count else float("inf")

    def _fewest_by_bound(self) -> int:
        low = least_devices(self._scenario) or 1
        for num_devices in range(low, self._num_devices):
            if self._by_bound(num_devices)[1] <= (self._goal.slo_itl or float("inf")):
                return num_devices
        return self._num_devices

    def _admit(self, option: Option) -> bool:
        """There is room; if not, the reason is kept."""
        reason = self._refusal(option)
        if reason:
            self._refused.append((option, reason))
        return not reason

    def _refusal(self, option: Option) -> str:
        if not is_possible(self._scenario.sizes, option):
            return f"{self._scenario.sizes.num_experts} experts are too few for so many expert workers or replicas"
        room = most_sequences(self._scenario, option)
        if room == 0:
            needed = max(weight_bytes(self._scenario.sizes, option))
            return f"weights of {needed / 1e9:.1f} GB per device leave no room for a sequence"
        if self._goal.sequences is not None and option.num_homes > self._goal.sequences:
            return f"fewer than {option.num_homes} sequences: some attention workers would have none"
        if room < max(self._goal.sequences or 1, option.num_homes):
            return f"room for {room} sequences only"
        return ""

    def _best_split(self, num_devices: int) -> int:
        splits = all_options(self._scenario, num_devices, Space(redundant=(0,), colocated=False))
        splits = [option for option in splits if not self._refusal(option)]
        chosen = promising(self._scenario, splits, self._num_devices, 1, self._typical(num_devices))
        return chosen[0].attention_devices if chosen else 0

    def _kept(self) -> list[Outcome]:
        """On the devices of the best, the best of each kind: colocated with and without replicas, apart, lockstep."""
        best = self._nearest()
        kinds: dict[tuple[str, bool, bool], Outcome] = {}
        for outcome in self._outcomes:
            kind, same = _kind(outcome.option), outcome.option.num_devices == best.option.num_devices
            if same and (kind not in kinds or _better(outcome, kinds[kind], self._goal)):
                kinds[kind] = outcome
        kinds[_kind(best.option)] = best
        return list(kinds.values())


def _kind(option: Option) -> tuple[str, bool, bool]:
    apart = option.attention_devices > 0
    return option.schedule, apart, apart or option.redundant > 0


def recommend(outcomes: Sequence[Outcome], goal: Goal) -> Outcome | None:
    """Of the schedule `waves`: at a rate the fewest devices and then the least ITL, else the most tokens per second;
    of those that are about as good, the fewest replicas, colocated before disaggregated. None meets the goal: None."""
    able = [o for o in outcomes if o.option.schedule == WAVES.name and o.meets(goal.slo_itl)]
    if not able:
        return None
    best = able[0]
    for outcome in able[1:]:
        if _better(outcome, best, goal):
            best = outcome
    near = [o for o in able if o.option.num_devices == best.option.num_devices and not _better(best, o, goal, ABOUT)]
    return min(near, key=lambda o: (o.option.redundant, o.option.attention_devices > 0, o.waves))


def _better(one: Outcome, other: Outcome, goal: Goal, by: float = 0.0) -> bool:
    if goal.rate is None:
        return one.throughput > other.throughput * (1 + by)
    if one.option.num_devices != other.option.num_devices:
        return one.option.num_devices < other.option.num_devices
    return one.mean_itl * (1 + by) < other.mean_itl


def sequences_within(points: Sequence[Outcome], slo_itl: float) -> int | None:
    """Most sequences of an option whose p99 ITL is within the SLO, between the simulated loads; None: none, or all."""
    ordered = sorted(points, key=lambda outcome: outcome.sequences)
    for below, above in pairwise(ordered):
        if below.p99_itl <= slo_itl < above.p99_itl:
            share = (slo_itl - below.p99_itl) / (above.p99_itl - below.p99_itl)
            count = int(below.sequences + 0.98 * share * (above.sequences - below.sequences))
            return count if below.sequences < count < above.sequences else None
    return None


def _splits(options: Sequence[Option]) -> set[int]:
    return {option.attention_devices for option in options}


def _index(waves: int) -> int:
    return min(range(len(WAVE_COUNTS)), key=lambda i: abs(WAVE_COUNTS[i] - waves))

"""Workers die, come back, come new, and experts move under sequences in flight: the oracle's tokens all the same."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from amoe.config import FailureConfig, PlacementConfig
from tests.unit.core.chaos import ChaosCluster
from tests.unit.core.examples import clusters
from tests.unit.core.scenario import PATIENT, Scenario
from tests.unit.core.scenarios import WAVES, scenarios

PLACEMENTS = (
    PlacementConfig(attention_workers=1, expert_workers=2, max_expert_workers=3),
    PlacementConfig(attention_workers=2, expert_workers=2, max_expert_workers=4),
    PlacementConfig(attention_workers=3, expert_workers=1, max_expert_workers=2),
    PlacementConfig(colocated=2),
    PlacementConfig(colocated=3),
)
ASYNC = (*WAVES, ("progress", 1), ("fcfs", 1), ("defrag", 1))


def faults_of(rng: random.Random, placement: PlacementConfig, *, homes: bool) -> tuple[tuple[int, str, int], ...]:
    """Some deaths, each with a successor, also two at once; spare workers; moves of experts."""
    mortal = [rank for rank in placement.owner_ranks if homes or rank not in placement.attention_ranks]
    mortal += list(placement.attention_ranks) if homes else []
    faults: list[tuple[int, str, int]] = []
    for _ in range(rng.choice([1, 2, 4])):
        turn = rng.randint(0, rng.choice([100, 1000, 3000]))
        for rank in rng.sample(mortal, min(len(mortal), rng.choice([1, 1, 2, len(mortal)]))):
            if rng.random() < 0.4:
                faults += [(turn + delay, "replace", rank) for delay in (0, 5, 10, 40)]
                continue
            faults.append((turn, "kill", rank))
            faults.append((turn + rng.choice([1, 30, 400]), "start", rank))
    for _ in range(rng.choice([0, 1, 3])):
        faults.append((rng.randint(0, 2000), "move", rng.randrange(2**32)))
    for rank in placement.owner_ranks[len(placement.expert_ranks) :]:
        faults.append((rng.randint(0, 500), "start", rank))
    # At last all are there who were there at first, so that every expert is somewhere.
    faults += [(20_000, "start", rank) for rank in range(placement.num_ranks)]
    return tuple(faults)


@st.composite
def broken(draw, *, homes: bool, loss: float = 0.0, **other) -> Scenario:
    """A scenario of which workers die."""
    scenario = draw(scenarios(placements=PLACEMENTS, schedules=ASYNC, max_requests=6, max_prompt=30, **other))
    rng = random.Random(draw(st.integers(0, 2**32)))
    scheduler = scenario.scheduler
    if scheduler.max_hold_s == PATIENT:  # whoever is gone has to be given up some time
        scheduler = replace(scheduler, max_hold_s=0.03)
    return replace(
        scenario,
        scheduler=scheduler,
        faults=faults_of(rng, scenario.placement, homes=homes),
        loss=loss,
        failure=FailureConfig(timeout_s=0.5),
    )


def run(scenario: Scenario) -> ChaosCluster:
    cluster = ChaosCluster(scenario)
    cluster.run()
    cluster.check_end()
    return cluster


@clusters(20)
@given(broken(homes=False))
def test_expert_workers_die_and_come_and_experts_move(scenario):
    run(scenario)


@clusters(20)
@given(broken(homes=False, replicas=True, duplicates=0.1))
def test_replicas_and_duplicates(scenario):
    run(scenario)


@clusters(20)
@given(broken(homes=False, loss=0.05))
def test_batches_are_lost_on_the_way(scenario):
    run(scenario)


@clusters(40)
@given(broken(homes=True))
def test_homes_die_too(scenario):
    run(scenario)


@clusters(20)
@given(broken(homes=True, aborts=True, loss=0.02, duplicates=0.05))
def test_everything_at_once(scenario):
    run(scenario)


@clusters(20)
@given(broken(homes=False), st.randoms(use_true_random=False))
def test_who_wants_exact_tokens_waits_and_the_others_go_on_without(scenario, rng):
    requests = tuple(replace(request, exact=rng.random() < 0.5) for request in scenario.requests)
    run(replace(scenario, requests=requests, failure=FailureConfig(timeout_s=0.5, on_expert_loss="reroute")))

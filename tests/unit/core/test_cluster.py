"""The invariants of the design on whole virtual clusters: any placement, any schedule, any order of delivery.

`run_scenario` checks them all: the oracle's tokens, one end for every request, nothing left behind, nothing shared.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.core.examples import clusters
from tests.unit.core.harness import run_scenario
from tests.unit.core.scenarios import PLACEMENTS, SCHEDULES, scenarios


def placement_name(placement):
    return f"a{len(placement.attention_ranks)}e{len(placement.expert_ranks)}of{placement.num_workers}"


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: f"{schedule[0]}{schedule[1]}")
@pytest.mark.parametrize("placement", PLACEMENTS, ids=placement_name)
@clusters(2)
@given(data=st.data())
def test_every_placement_and_schedule(placement, schedule, data):
    run_scenario(data.draw(scenarios(placements=[placement], schedules=[schedule], max_requests=4, max_prompt=30)))


@clusters(20)
@given(scenarios())
def test_long_prompts_in_small_chunks(scenario):
    run_scenario(scenario)


@clusters(25)
@given(scenarios(aborts=True, max_requests=10, max_prompt=6, max_tokens=30))
def test_long_answers_in_little_memory(scenario):
    """They grow until somebody is preempted."""
    run_scenario(scenario)


@clusters(30)
@given(scenarios(aborts=True))
def test_aborts_at_any_time(scenario):
    run_scenario(scenario)


@clusters(30)
@given(scenarios(aborts=True, duplicates=0.3))
def test_duplicates_and_late_answers_change_nothing(scenario):
    run_scenario(scenario)


@clusters(10)
@given(scenarios(roomy=True, max_requests=12))
def test_nobody_is_preempted_where_there_is_room(scenario):
    cluster = run_scenario(scenario)
    assert all(home.batcher.num_preemptions == 0 for home in cluster.homes)


SEVERAL_OWNERS = [placement for placement in PLACEMENTS if len(placement.expert_ranks) > 1]


@clusters(40)
@given(scenarios(placements=SEVERAL_OWNERS, aborts=True, duplicates=0.3, replicas=True))
def test_replicas_whose_shares_change_at_any_time(scenario):
    """An expert that is missed, or that two replicas compute for one token, makes a wrong token."""
    run_scenario(scenario)


@clusters(30)
@given(scenarios(aborts=True, duplicates=0.3, max_prompt=40))
def test_prompts_whose_log_probabilities_are_wanted(scenario):
    """All of them; chunks and preemptions, last layers with experts and without."""
    requests = tuple(replace(request, scored=True) for request in scenario.requests)
    cluster = run_scenario(replace(scenario, requests=requests))
    for request in requests:
        if request.abort is None:
            scored = cluster.home_of(request).scored[request.request_id]
            assert scored == list(range(len(request.prompt) - 1))

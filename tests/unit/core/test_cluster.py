"""The invariants of the design on whole virtual clusters: any placement, any schedule, any order of delivery.

`run_scenario` checks them all: the oracle's tokens, one end for every request, nothing left behind, nothing shared.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoe.core.sequence import SequenceStatus
from tests.unit.core.examples import clusters
from tests.unit.core.harness import Cluster, run_scenario
from tests.unit.core.scenarios import PLACEMENTS, SCHEDULES, scenarios, with_siblings


class PriorityCluster(Cluster):
    """Watches who is admitted and who is preempted."""

    def turn(self, worker):
        if worker not in self.homes:
            return super().turn(worker)
        batcher = worker.batcher
        waiting = {s.request_id: s for s in batcher.waiting}
        running = dict(batcher.running)
        num_preemptions = batcher.num_preemptions
        acted = super().turn(worker)
        admitted = [s for request_id, s in waiting.items() if request_id in batcher.running]
        left = [s for request_id, s in waiting.items() if request_id not in batcher.running]
        if admitted and left:
            assert max(s.order for s in admitted) < min(s.order for s in left), "a worse one was admitted"
        preempted = [s for request_id, s in running.items() if s.status is SequenceStatus.WAITING]
        assert len(preempted) == batcher.num_preemptions - num_preemptions
        stayed = [s for s in running.values() if s.request_id in batcher.running]
        if preempted:
            assert not admitted, "whoever was preempted, or another, takes the blocks that were needed"
            assert not stayed or max(s.order for s in stayed) < min(s.order for s in preempted)
        return acted


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


@clusters(40)
@given(scenarios(aborts=True, duplicates=0.3, max_requests=5, max_prompt=40).flatmap(with_siblings))
def test_siblings_share_what_they_may_and_get_their_own_tokens(scenario):
    run_scenario(scenario)


@clusters(20)
@given(scenarios(roomy=True, max_requests=3, max_prompt=60).flatmap(with_siblings))
def test_where_there_is_room_siblings_compute_the_prompt_once(scenario):
    """Each computes what is left behind the last full block; the first one the rest, with a prefix cache or without."""
    requests = tuple(
        replace(request, scored=False, routed=False, arrive=0, abort=None) for request in scenario.requests
    )
    cluster = run_scenario(replace(scenario, requests=requests))
    size = scenario.cache.block_size
    for request in requests:
        if request.sibling_of is not None:
            num_shared = (len(request.prompt) - 1) // size * size
            computed = cluster.home_of(request).num_prefilled[request.request_id]
            assert computed == len(request.prompt) - num_shared


@clusters(30)
@given(scenarios(aborts=True, max_requests=10, max_prompt=20))
def test_the_best_priority_goes_first(scenario):
    """It is admitted before all that wait, and never preempted for others; whoever runs is not put aside for it."""
    scheduler = replace(scenario.scheduler, scheduling_policy="priority")
    cluster = PriorityCluster(replace(scenario, scheduler=scheduler))
    cluster.run()
    cluster.check_end()


@clusters(30)
@given(scenarios(aborts=True, duplicates=0.3, max_prompt=40))
def test_experts_that_tokens_took(scenario):
    """All of them, each once; chunks, preemptions, prefix caches full of what others computed."""
    run_scenario(replace(scenario, requests=tuple(replace(request, routed=True) for request in scenario.requests)))


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

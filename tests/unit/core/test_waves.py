"""Waves on virtual clusters: exact under every disturbance, strict while all is well, and never held for long."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoe.config import PlacementConfig, SchedulerConfig
from amoe.core.steps import AttentionStep, ExpertsStep
from amoe.policy.placement import place_experts
from amoe.policy.scheduler import num_stages
from tests.unit.core.examples import clusters
from tests.unit.core.fake_model import ModelSpec
from tests.unit.core.harness import Cluster, run_scenario
from tests.unit.core.scenario import PATIENT, Request, Scenario
from tests.unit.core.scenarios import PLACEMENTS, WAVES, scenarios
from tests.unit.core.test_waiting import TimedCluster

MANY_HOMES = tuple(placement for placement in PLACEMENTS if len(placement.attention_ranks) > 1)


# ---- exact, whatever happens


@clusters(30)
@given(scenarios(schedules=WAVES, aborts=True, max_requests=10, max_prompt=6, max_tokens=30))
def test_long_answers_in_little_memory(scenario):
    """They grow until somebody is preempted."""
    run_scenario(scenario)


@clusters(40)
@given(scenarios(schedules=WAVES, placements=MANY_HOMES, aborts=True, duplicates=0.3))
def test_aborts_duplicates_and_late_answers(scenario):
    run_scenario(scenario)


@clusters(30)
@given(scenarios(schedules=[("waves", None)], aborts=True, max_tokens=30))
def test_the_number_of_waves_changes_all_the_time(scenario):
    cluster = run_scenario(scenario)
    leader = cluster.homes[0].core
    assert 1 <= leader.num_waves <= scenario.scheduler.max_waves


@clusters(20)
@given(scenarios(schedules=WAVES, placements=MANY_HOMES, max_requests=4))
def test_homes_with_nothing_to_do(scenario):
    """All requests go to one home: the others only have to say that they bring nothing."""
    lonely = tuple(replace(request, home=1) for request in scenario.requests)
    run_scenario(replace(scenario, requests=lonely))


# ---- strict while all is well


class CountingCluster(Cluster):
    """Counts expert steps, and notes the stages that every wave goes through at the first home."""

    def __init__(self, scenario):
        super().__init__(scenario)
        self.num_experts_steps = 0
        for worker in self.workers:
            self.watch(worker)

    def watch(self, worker):
        run = worker.run

        def watched_run(step, now):
            self.num_experts_steps += isinstance(step, ExpertsStep)
            return run(step, now)

        worker.run = watched_run


def equal_requests(num_requests, prompt_len=3, max_tokens=12):
    prompts = [[(7 * i + j) % 60 + 6 for j in range(prompt_len)] for i in range(num_requests)]
    return tuple(Request(i, i, tuple(prompt), max_tokens) for i, prompt in enumerate(prompts))


def steady(schedule, count, placement, **scheduler):
    """Requests that come together and stay together: the same number at each home, no end of sequence."""
    waves = {"num_waves": count} if schedule == "waves" else {"micro_batches": count}
    config = SchedulerConfig(schedule=schedule, max_hold_s=PATIENT, max_num_seqs=24, **waves, **scheduler)
    spec = ModelSpec((True,) * 4, 2, (0,) * 8, vocab=10_007, eos=-1)
    return Scenario(equal_requests(12), spec=spec, placement=placement, scheduler=config, seed=3)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("placement", MANY_HOMES, ids=lambda p: f"a{len(p.attention_ranks)}of{p.num_workers}")
def test_waves_are_as_strict_as_lockstep(placement, count):
    """As few and as large steps, although no home waits for the others' announcements."""
    steps = {}
    for schedule in ("waves", "lockstep", "progress"):
        cluster = CountingCluster(steady(schedule, count if schedule != "progress" else 1, placement))
        cluster.run()
        cluster.check_end()
        steps[schedule] = cluster.num_experts_steps
    assert steps["waves"] <= 1.1 * steps["lockstep"]
    assert steps["progress"] > 1.5 * steps["lockstep"] / count, "this cluster does tear batches apart"


@pytest.mark.parametrize("num_waves", [2, 3])
def test_waves_draw_apart(num_waves):
    """Steady state: when a wave enters attention(l), the others are a good part of S/W stages away."""
    scenario = steady("waves", num_waves, PlacementConfig(colocated=2), max_wait_s=PATIENT)
    spec = ModelSpec((True,) * 8, 2, (0,) * 8, vocab=10_007, eos=-1)
    scheduler = replace(scenario.scheduler, max_hold_s=1.0)
    scenario = replace(scenario, spec=spec, scheduler=scheduler, requests=equal_requests(12, max_tokens=30))
    stages, tracks = num_stages(8), {}
    cluster = TimedCluster(scenario, PATIENT)
    home = cluster.homes[0]
    run = home.run

    def watched_run(step, now):
        if isinstance(step, AttentionStep) and step.num_tokens:
            iteration = int(home.batcher.tokens.iteration[step.slots[0]])
            tracks.setdefault(step.block.wave, []).append((now, iteration * stages + 2 * step.block.layer))
        return run(step, now)

    home.run = watched_run
    cluster.run()
    cluster.check_end()
    gaps = []
    for now, kappa in tracks[0]:
        if kappa // stages in range(8, 28):
            others = [max(k for t, k in tracks[wave] if t <= now) for wave in range(1, num_waves)]
            gaps += [(kappa - other) / stages % 1 for other in others]
    assert sum(min(gap, 1 - gap) >= 0.4 / num_waves for gap in gaps) > 0.9 * len(gaps)


# ---- nobody is held for long


class StoppingCluster(Cluster):
    """Notes who has ended while a worker stands still."""

    ended: set[int] | None = None

    def at_standstill(self):
        self.ended = {request_id for home in self.homes for request_id, times in home.terminal.items() if times}
        self.waited = self.clock.now()

    def free_of(self, rank):
        """Requests that need nothing of this worker."""
        scenario, owners = self.scenario, self.scenario.placement.expert_ranks
        held = place_experts(scenario.spec.num_layers, scenario.spec.num_experts, len(owners))
        here = owners.index(rank) if rank in owners else -1
        return {
            request.request_id
            for request in scenario.requests
            if self.home_of(request).rank != rank
            and not any(here in held[layer, expert] for layer, expert in self.oracles[request.request_id].experts)
        }


@clusters(60)
@given(
    scenarios(schedules=WAVES, placements=MANY_HOMES, aborts=True, duplicates=0.1, roomy=True),
    st.sampled_from([0.003, 0.03]),
    st.integers(0, 4),
    st.sampled_from([40, 0, 10, 200, 500]),
    st.booleans(),
)
def test_a_worker_that_stops_holds_up_nobody_who_does_not_need_it(scenario, max_hold, rank, turn, lean):
    rank %= scenario.placement.num_workers
    spec, num_owners = scenario.spec, len(scenario.placement.expert_ranks)
    if lean:  # the router prefers the experts of one worker so much that the others are never needed
        owners = place_experts(spec.num_layers, spec.num_experts, num_owners)[0].ravel()
        spec = replace(spec, bias=tuple(int(owner == 0) << 22 for owner in owners), top_k=1)
    scheduler = replace(scenario.scheduler, max_hold_s=max_hold)
    cluster = StoppingCluster(replace(scenario, spec=spec, scheduler=scheduler, stopped=(rank, turn)))
    cluster.run()
    cluster.check_end()
    assert cluster.ended is not None
    assert cluster.ended >= cluster.free_of(rank)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("num_waves", [1, 3])
def test_whoever_is_missing_is_waited_for_once_and_not_at_every_layer(num_waves, rank):
    """Home 1, or expert worker 3, stops in the middle; ten tokens through 4 layers are still to come."""
    hold = 1000.0
    placement = PlacementConfig(attention_workers=2, expert_workers=2)
    scenario = steady("waves", num_waves, placement, max_wait_s=PATIENT)
    scheduler = replace(scenario.scheduler, max_hold_s=hold)
    lean = replace(scenario.spec, bias=(1 << 22,) * 4 + (0,) * 4) if rank == 3 else scenario.spec
    scenario = replace(scenario, spec=lean, scheduler=scheduler, stopped=(rank, 100))
    cluster = StoppingCluster(scenario)
    cluster.run()
    cluster.check_end()
    assert cluster.free_of(rank)
    assert cluster.ended >= cluster.free_of(rank)
    assert cluster.waited < (2 * num_waves + 2) * hold


def test_a_home_that_comes_back_is_waited_for_again():
    """Home 1 stops, and is back before half of the requests come: by then the waves have closed up, and none slips."""
    scenario = steady("waves", 1, PlacementConfig(attention_workers=2, expert_workers=1))
    scheduler = replace(scenario.scheduler, max_hold_s=50.0)
    late = tuple(replace(r, request_id=r.request_id + 100, max_tokens=30, arrive=4000) for r in scenario.requests)
    scenario = replace(scenario, requests=scenario.requests + late, scheduler=scheduler)
    undisturbed = CountingCluster(scenario)
    undisturbed.run()
    cluster = CountingCluster(replace(scenario, stopped=(1, 100), resumes=1000))
    cluster.run()
    cluster.check_end()
    assert 0 < cluster.workers[2].core.num_slips <= 3
    assert cluster.num_experts_steps < 1.5 * undisturbed.num_experts_steps

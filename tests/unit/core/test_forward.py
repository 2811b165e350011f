"""The schedule `forward`: all that holds of a cluster holds of one worker that takes tokens through the whole model.

`run_scenario` checks the oracle's tokens, one end for every request, slots, rows and KV blocks.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoe.config import CacheConfig, CapacityConfig, EngineConfig, FailureConfig, PlacementConfig, SchedulerConfig
from amoe.core.steps import ForwardStep
from amoe.core.trace import Trace, record
from amoe.core.worker import ModelShape, WorkerCore
from amoe.errors import ConfigError
from amoe.policy.decision import Reason
from amoe.sim.replay import replay
from amoe.types import SamplingParams
from tests.unit.core.examples import clusters
from tests.unit.core.harness import Cluster, run_scenario
from tests.unit.core.scenarios import FORWARD, scenarios, with_siblings
from tests.unit.core.test_cluster import PriorityCluster
from tests.unit.core.test_recovery import faults_of
from tests.unit.core.test_recovery import run as run_faults

ALONE = {"schedules": FORWARD, "placements": [PlacementConfig(), PlacementConfig(colocated=1)]}


@clusters(40)
@given(scenarios(aborts=True, **ALONE))
def test_any_load(scenario):
    run_scenario(scenario)


@clusters(30)
@given(scenarios(aborts=True, max_requests=10, max_prompt=6, max_tokens=30, **ALONE))
def test_long_answers_in_little_memory(scenario):
    """They grow until somebody is preempted."""
    run_scenario(scenario)


@clusters(30)
@given(scenarios(aborts=True, max_requests=5, max_prompt=40, **ALONE).flatmap(with_siblings))
def test_siblings_share_what_they_may_and_get_their_own_tokens(scenario):
    run_scenario(scenario)


@clusters(20)
@given(scenarios(aborts=True, max_prompt=12, max_tokens=20, **ALONE))
def test_the_first_in_order_are_admitted_first_and_preempted_last(scenario):
    scheduler = replace(scenario.scheduler, scheduling_policy="priority")
    cluster = PriorityCluster(replace(scenario, scheduler=scheduler))
    cluster.run()
    cluster.check_end()


@clusters(20)
@given(scenarios(aborts=True, max_requests=6, max_prompt=30, **ALONE), st.randoms(use_true_random=False))
def test_whoever_takes_the_place_of_a_dead_worker_goes_on(scenario, rng):
    run_faults(replace(scenario, faults=faults_of(rng, scenario.placement, homes=True)))


@clusters(15)
@given(scenarios(roomy=True, max_requests=8, **ALONE))
def test_an_iteration_is_one_step(scenario):
    """Where there is room, everybody gets a token with every step from the end of the prompt on."""

    class Watched(Cluster):
        def turn(self, worker):
            decoding = {s.request_id for s in worker.batcher.running.values() if len(s.slots)}
            before = {request_id: len(worker.streamed[request_id]) for request_id in decoding}
            acted = super().turn(worker)
            assert all(len(worker.streamed[request_id]) == count + 1 for request_id, count in before.items())
            assert not worker.core.queues.depth.any()
            return acted

    cluster = Watched(scenario)
    cluster.run()
    cluster.check_end()


# ---- single steps


def make_core(max_prefill: int = 8, num_blocks: int = 20, max_model_len: int = 40, max_num_seqs: int = 4) -> WorkerCore:
    config = EngineConfig(
        model="m",
        scheduler=SchedulerConfig(schedule="forward", max_num_seqs=max_num_seqs, max_num_batched_tokens=max_prefill),
        cache=CacheConfig(block_size=4),
    )
    return WorkerCore(config, ModelShape((True, True), 6), 0, num_kv_blocks=num_blocks, max_model_len=max_model_len)


def add(core: WorkerCore, request_id: int, length: int, **params) -> None:
    prompt = np.arange(length, dtype=np.int32) + 10 * request_id
    core.batcher.add(request_id, prompt, SamplingParams(max_tokens=4, **params))


def run(core: WorkerCore, *finished: int, seconds: float = 0.0) -> ForwardStep:
    """The next step, whose tokens all go to expert 0; the sequences in the rows `finished` end."""
    step = core.next_step(0.0)
    sizes = (step.num_tokens, step.num_wanted)
    core.forward.on_forward(step, {layer: np.zeros((size, 2), np.int64) for layer, size in enumerate(sizes)})
    if step.head is not None:
        ends = np.isin(step.head.rows, finished)
        core.forward.on_head(step.head, np.full(len(ends), 7), ends)
    core.forward.observe(step, seconds)
    return step


def test_decodes_come_first_and_chunks_follow_within_the_budget():
    core = make_core()
    add(core, 0, 3)
    first = run(core)
    assert (first.num_decodes, first.positions.tolist(), first.wanted.tolist()) == (0, [0, 1, 2], [2])
    assert [(span.start, span.end, span.row) for span in first.chunks] == [(0, 3, 0)]
    add(core, 1, 3)
    add(core, 2, 9)
    second = run(core)
    assert (second.num_decodes, second.rows.tolist()) == (1, [0, 1, 1, 1, 2, 2, 2, 2, 2])
    assert second.positions.tolist() == [3, 0, 1, 2, 0, 1, 2, 3, 4]
    assert [(span.start, span.end, span.row) for span in second.chunks] == [(1, 4, 1), (4, 9, 2)]
    assert second.wanted.tolist() == [0, 3]  # the third prompt goes on
    assert second.head.rows.tolist() == [0, 1]
    third = run(core)
    assert (third.num_decodes, third.positions.tolist(), third.head.rows.tolist()) == (2, [4, 3, 5, 6, 7, 8], [0, 1, 2])
    fourth = run(core)
    assert (fourth.wanted, fourth.head_rows, fourth.head.rows.tolist()) == (None, None, [0, 1, 2])


def test_a_step_of_prompts_that_go_on_has_no_head():
    core = make_core(max_prefill=4)
    add(core, 0, 6)
    step = run(core)
    assert (step.num_wanted, step.head) == (0, None)
    assert run(core).head.rows.tolist() == [0]


def test_scored_prompts_are_told_apart_from_what_is_sampled():
    core = make_core()
    add(core, 0, 2)
    run(core)
    add(core, 1, 4, prompt_logprobs=0)
    step = run(core)
    assert step.wanted.tolist() == [0, 1, 2, 3, 4]
    assert (step.head_rows.tolist(), step.prompt_rows.tolist()) == ([0, 4], [1, 2, 3])
    assert step.head.prompt.positions.tolist() == [0, 1, 2]
    assert step.head.slots.tolist() == step.slots[[0, 4]].tolist()
    assert step.head.prompt.slots.tolist() == step.slots[[1, 2, 3]].tolist()


def test_nothing_to_do_is_idleness_and_every_step_is_counted():
    core = make_core()
    assert core.next_step(0.0) is None
    assert core.reason_to_wait is Reason.IDLE
    add(core, 0, 3)
    run(core)
    run(core, 0)
    assert core.next_step(0.0) is None
    assert core.next_deadline(0.0) is None
    counted = {(item.block, item.reason): item.count for item in core.decisions.snapshot()}
    assert counted == {("forward", "only"): 2, ("none", "idle"): 2}
    assert core.batcher.slots.num_free == core.batcher.slots.num_slots


def test_who_decodes_is_not_kept_waiting_by_a_long_prompt():
    core = make_core(max_prefill=2000, max_model_len=4000, num_blocks=2000)
    add(core, 0, 2000)
    assert run(core, seconds=1.0).num_tokens == 2000  # nobody waits: a millisecond for two tokens
    add(core, 1, 2000)
    assert run(core, seconds=0.5).num_tokens == 1 + 500
    assert run(core, seconds=0.5).num_tokens == 1 + 400  # that was slower
    assert run(core, 0, seconds=0.5).num_tokens == 1 + 320
    assert run(core).num_tokens == 2000 - 500 - 400 - 320, "nobody else is here any more"


def test_a_crowd_of_prompts_goes_first():
    core = make_core(max_prefill=2000, max_model_len=4000, num_blocks=4000, max_num_seqs=20)
    add(core, 0, 10)
    run(core)
    for request_id in range(1, 10):
        add(core, request_id, 900)
    assert run(core).num_tokens == 1 + 2000
    assert [run(core).num_tokens for _ in range(2)] == [3 + 512, 3 + 512]


def test_no_room_for_the_next_one_is_waited_for():
    core = make_core(num_blocks=3)
    add(core, 0, 7)
    add(core, 1, 7)
    assert run(core).rows.tolist() == [0] * 7
    assert run(core, 0).num_tokens == 1
    assert run(core).positions.tolist() == list(range(7))


def test_a_record_is_repeated_with_the_times_that_steps_took():
    core = make_core(max_prefill=2000, max_model_len=4000, num_blocks=2000)
    trace = record(core, core._config, ModelShape((True, True), 6))
    add(core, 0, 2000, return_routed_experts=True)
    for request_id, seconds in ((1, 1.0), (2, 0.5)):
        core.start(0.0)
        run(core, seconds=seconds)
        add(core, request_id, 2000)
    core.start(0.0)
    assert run(core).num_tokens == 1 + 400
    assert replay(Trace.from_lines(trace.to_lines())) is None
    index = next(index for index, entry in enumerate(trace.entries) if entry.call == "observe")
    trace.entries[index] = replace(trace.entries[index], given=0.7)
    difference = replay(trace)
    assert difference is not None
    assert (difference.call, difference.where[:4]) == ("next_step", "said")


# ---- which schedule it is


def schedule_of(schedule: str = "auto", num_waves: int | None = None, **config) -> str:
    scheduler = SchedulerConfig(schedule=schedule, num_waves=num_waves)
    return EngineConfig(model="m", scheduler=scheduler, **config).scheduler.schedule


ELSEWHERE = {
    "workers": ({"placement": PlacementConfig(colocated=2)}, "one worker"),
    "spare": ({"placement": PlacementConfig(expert_workers=1, max_expert_workers=3)}, "one worker"),
    "emulated": ({"device": "emulated:h100"}, "not emulated"),
    "capacity": ({"capacity": CapacityConfig(factor=1.5)}, "--capacity-factor"),
    "reroute": ({"failure": FailureConfig(on_expert_loss="reroute")}, "--on-expert-loss"),
}


@pytest.mark.parametrize("config", [{}, {"placement": PlacementConfig(colocated=1)}, {"device": "cuda"}], ids=str)
def test_one_worker_goes_forward(config):
    assert schedule_of(**config) == schedule_of("forward", **config) == "forward"
    assert schedule_of("waves", **config) == "waves"


@pytest.mark.parametrize("name", ELSEWHERE)
def test_where_it_cannot_be_auto_is_waves_and_forward_is_refused(name):
    config, complaint = ELSEWHERE[name]
    assert schedule_of(**config) == "waves"
    with pytest.raises(ConfigError, match=f"--schedule forward .*{complaint}"):
        schedule_of("forward", **config)


def test_who_names_a_number_of_waves_gets_waves():
    assert schedule_of(num_waves=2) == "waves"
    with pytest.raises(ConfigError, match="--waves N is for --schedule waves"):
        schedule_of("forward", num_waves=2)


def test_the_choice_stays_when_the_rest_changes():
    config = EngineConfig(model="m")
    assert replace(config, seed=3).scheduler == config.scheduler == SchedulerConfig(schedule="forward")

"""`amoe.sim.planner`, `plan_options`, `plan_search`: memory, Little's law, what is recommended and why."""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import pytest

from amoe.errors import ConfigError
from amoe.profiles.devices import DEVICES
from amoe.profiles.models import ModelSizes, grouped_query_attention, model_sizes
from amoe.profiles.routing import log_normal_routing
from amoe.server.engine_flags import add_engine_flags, engine_config
from amoe.sim.plan_options import Space, all_options, no_room, promising
from amoe.sim.plan_report import recommendation, refusals, serve_flags
from amoe.sim.plan_search import Goal, Job, recommend, search, sequences_within
from amoe.sim.planner import (
    Evaluator,
    Option,
    Outcome,
    Scenario,
    least_devices,
    most_sequences,
    prefill_seconds,
    sequences_in_flight,
    used_bytes,
    weight_bytes,
)

TINY = ModelSizes(
    name="tiny",
    num_layers=4,
    hidden_size=4096,
    num_experts=16,
    top_k=2,
    moe_intermediate_size=8192,
    vocab_size=32000,
    **grouped_query_attention(4096, 32, 8, 128),
)
GIGABYTE = 1e9


def scenario(sizes: ModelSizes = TINY, *, memory_gb: float = 80.0, sigma: float = 1.0, **changes) -> Scenario:
    popularity = log_normal_routing(sizes, sigma, 0).popularity()
    device = replace(DEVICES["h100"], memory_bytes=memory_gb * GIGABYTE)
    values = {"num_iterations": 5, "popularity": popularity, "believed": popularity} | changes
    return Scenario(sizes=sizes, device=device, **values)


def plan(what: Scenario, num_devices: int, goal: Goal, **space):
    evaluator = Evaluator(what, num_devices)
    return search(what, num_devices, goal, Space(**space), lambda _, jobs: [job.run(evaluator) for job in jobs])


def outcome(**changes) -> Outcome:
    values = {
        "option": Option(num_devices=4),
        "sequences": 100,
        "waves": 1,
        "throughput": 1000.0,
        "mean_itl": 0.1,
        "p99_itl": 0.11,
        "busy": 0.9,
        "bound_share": 0.8,
        "prefill_share": 0.2,
        "memory_bytes": 1e9,
    }
    return Outcome(**values | changes)


# ---- Little's law


def test_little_law_with_a_constant_interval():
    # 10 requests/s of 100 tokens at 50 ms each: 10 · 100 · 0.05 = 50 are in flight.
    assert sequences_in_flight(1000.0, lambda _: 0.05, least=4, most=1000) == 50


@pytest.mark.parametrize("guess", [4, 60, 200, 900, 1000])
def test_little_law_with_an_interval_that_grows(guess):
    # C = 1000 · (0.02 + 0.0009 C) has C = 20 / (1 - 0.9) = 200.
    found = sequences_in_flight(1000.0, lambda c: 0.02 + 0.0009 * c, least=4, most=1000, guess=guess)
    assert found is not None
    assert abs(found - 200) <= 0.01 * 200


def test_little_law_with_steps():
    def itl(count: int) -> float:  # as where the number of waves changes
        return 0.02 + 0.0002 * count + 0.01 * (count > 60)

    found = sequences_in_flight(1000.0, itl, least=4, most=1000)
    assert found is not None
    assert found >= 0.98 * 1000 * itl(found)


def test_little_law_told_as_not_sustainable():
    assert sequences_in_flight(1000.0, lambda c: 0.02 + 0.0012 * c, least=4, most=5000) is None
    assert sequences_in_flight(1000.0, lambda _: 0.05, least=4, most=49 - 1) is None


def test_little_law_with_less_than_a_sequence_per_worker():
    assert sequences_in_flight(1.0, lambda _: 0.01, least=8, most=100) == 8


def test_rate_is_answered_by_as_many_sequences_as_the_interval_asks_for():
    what = scenario()
    found = Evaluator(what, 4).at_rate(Option(num_devices=4), rate=50.0)
    assert found.sustained
    assert found.throughput == 50.0 * what.output_len
    assert found.sequences == pytest.approx(50.0 * what.output_len * found.mean_itl, rel=0.025, abs=1.5)


def test_a_rate_beyond_the_devices_is_not_sustained():
    found = Evaluator(scenario(), 4).at_rate(Option(num_devices=4), rate=1e5)
    assert not found.sustained
    assert found.sequences == most_sequences(scenario(), Option(num_devices=4))
    assert not found.meets(None)


# ---- prefill


def test_prefill_is_the_roofline_of_the_prompt():
    what = scenario(input_len=100)
    sizes = what.sizes
    attention = 2 * 100 * sum(sizes.block_params(i) for i in range(4)) + sizes.attention_flops * 100 * 101 / 2 * 4
    experts = 2 * 100 * sizes.expert_params * 2 * 4
    flops = what.device.flops
    even = prefill_seconds(what, Option(num_devices=4), np.ones(4))
    assert even == pytest.approx((attention + experts) / flops / 4)
    apart = prefill_seconds(what, Option(num_devices=4, attention_devices=1), np.ones(4))
    assert apart == pytest.approx(max(attention, experts / 3) / flops)
    slower = prefill_seconds(what, Option(num_devices=4), np.array([2.0, 1, 1, 1]))
    assert slower == pytest.approx(even * 4 / 3.5)
    assert prefill_seconds(replace(what, prefill=False), Option(num_devices=4), np.ones(4)) == 0


def test_prefill_takes_its_share_of_the_time():
    option = Option(num_devices=4)
    without = Evaluator(scenario(prefill=False), 4).closed(option, 256)
    with_it = Evaluator(scenario(), 4).closed(option, 256)
    assert without.prefill_share == 0
    assert with_it.throughput == pytest.approx(without.throughput * (1 - with_it.prefill_share))
    rate = with_it.throughput / scenario().output_len
    assert with_it.prefill_share == pytest.approx(rate * prefill_seconds(scenario(), option, np.ones(4)))
    assert with_it.bound_share == without.bound_share


# ---- memory


def test_weights_of_a_placement():
    experts = 4 * TINY.expert_bytes  # of one expert in all layers
    assert weight_bytes(TINY, Option(num_devices=4)) == (TINY.attention_bytes + 4 * experts,) * 2
    apart = Option(num_devices=4, attention_devices=1, redundant=2)
    assert weight_bytes(TINY, apart) == (TINY.attention_bytes, (6 + 2) * experts)


def test_sequences_fill_what_weights_leave():
    what = scenario()
    option = Option(num_devices=4, redundant=1)
    most = most_sequences(what, option)
    assert most > 0
    assert used_bytes(what, option, most) <= what.device.memory_bytes
    assert most_sequences(what, replace(option, redundant=2)) < most
    assert most_sequences(scenario(memory_gb=1.0), option) == 0


def test_a_model_that_does_not_fit_is_told_with_the_least_devices():
    what = scenario(memory_gb=6.0)
    least = least_devices(what)
    assert least is not None and least > 2
    with pytest.raises(ConfigError, match=f"tiny does not fit 2 × h100 .6 GB.: at least {least} devices are needed"):
        plan(what, 2, Goal())
    assert plan(what, least, Goal(sequences=least), lockstep=()).outcomes


def test_no_number_of_devices_would_do():
    what = scenario(memory_gb=0.5)
    assert least_devices(what) is None
    assert "no number of them would do" in no_room(what, 4, 1)


def test_the_least_devices_grow_with_the_load():
    few, many = (least_devices(scenario(memory_gb=8.0), sequences) for sequences in (1, 2000))
    assert few is not None and many is not None
    assert few < many


def test_replicas_without_room_are_refused_with_a_reason():
    what = scenario(memory_gb=8.0)
    found = plan(what, 4, Goal(sequences=64), redundant=(0, 12), disaggregated=False, lockstep=())
    assert all(outcome.option.redundant == 0 for outcome in found.outcomes)
    (line,) = refusals(found.refused)
    assert line.startswith("4 colocated with 12 replicas or more (")


# ---- what there is to try


def test_options_hold_every_expert_once_at_least():
    for num_devices in (1, 2, 5, 16, 20):
        for option in all_options(scenario(), num_devices, Space()):
            slots = -(-16 // option.num_owners) + option.redundant
            assert option.num_owners <= 16 and slots * option.num_owners >= 16
            assert slots <= 16


def test_a_single_device_has_one_option():
    assert all_options(scenario(), 1, Space()) == [Option(num_devices=1)]
    found = plan(scenario(), 1, Goal(sequences=16), lockstep=("ep",))
    assert found.best is not None and found.best.option == Option(num_devices=1)


def test_promising_keeps_colocated_and_a_few_ratios():
    options = all_options(scenario(), 16, Space(redundant=(0,)))
    kept = promising(scenario(), options, 16, 2, 1024)
    assert [option.attention_devices for option in kept].count(0) == 1
    assert len(kept) == 3


def test_more_devices_than_experts_are_used_apart():
    found = plan(scenario(), 20, Goal(sequences=256), redundant=(0, 1), lockstep=("ping-pong",))
    assert {outcome.option.schedule for outcome in found.outcomes} == {"waves", "ping-pong"}
    assert all(o.option.attention_devices >= 4 or o.option.num_devices == 16 for o in found.outcomes)
    assert {outcome.option.num_devices for outcome in found.outcomes} == {16, 20}


def test_lockstep_that_cannot_be_is_refused_with_a_reason():
    found = plan(scenario(), 20, Goal(sequences=256), redundant=(0,), colocated=False, lockstep=("ep",))
    assert refusals(found.refused)[-1].startswith("20 colocated (16 experts are too few")


def test_slowest_devices_are_left_out_first():
    what = scenario(slow={0: 2.0, 2: 1.5})
    assert what.slow_of(4, 4) == {0: 2.0, 2: 1.5}
    assert what.slow_of(3, 4) == {1: 1.5}
    assert what.slow_of(2, 4) == {}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Goal(sequences=1, rate=1.0),
        lambda: Goal(rate=float("inf")),
        lambda: Goal(slo_itl=0.0),
        lambda: Space(lockstep=("waves",)),
        lambda: Space(lockstep=("nothing",)),
        lambda: Space(colocated=False, disaggregated=False),
        lambda: Space(redundant=()),
        lambda: Space(redundant=(2, 0)),
        lambda: scenario(output_len=0),
        lambda: scenario(believed=np.ones((2, 2))),
    ],
)
def test_what_cannot_be(make):
    with pytest.raises(ConfigError):
        make()


# ---- what is recommended


def test_recommended_is_the_simplest_of_those_that_are_about_as_good():
    simple, better = outcome(throughput=995.0), outcome(option=Option(num_devices=4, redundant=2))
    assert recommend([better, simple], Goal(sequences=100)) is simple
    simple = outcome(throughput=900.0)
    assert recommend([better, simple], Goal(sequences=100)) is better


def test_recommended_at_a_rate_are_the_fewest_devices():
    many, few = outcome(mean_itl=0.01, p99_itl=0.01), outcome(option=Option(num_devices=2))
    assert recommend([many, few], Goal(rate=1.0, slo_itl=0.2)) is few
    assert recommend([many, few], Goal(rate=1.0, slo_itl=0.1)) is many
    assert recommend([many, replace(few, sustained=False)], Goal(rate=1.0)) is many
    assert recommend([replace(few, sustained=False)], Goal(rate=1.0)) is None


def test_lockstep_is_never_recommended_but_told_where_it_is_better():
    rival = outcome(option=Option(num_devices=4, schedule="tbo"), throughput=2000.0)
    own = outcome()
    goal = Goal(sequences=100)
    assert recommend([rival, own], goal) is own
    what = scenario()
    found = plan(what, 2, goal, redundant=(0,), disaggregated=False, lockstep=())
    text = recommendation(what, replace(found, outcomes=(own, rival), best=own), "tiny")
    assert text[-1].startswith("note: tbo, 4 colocated does better here")


def test_an_slo_between_two_loads():
    points = [outcome(sequences=100, p99_itl=0.1), outcome(sequences=200, p99_itl=0.2)]
    assert sequences_within(points, 0.15) == 149
    assert sequences_within(points, 0.25) is None
    assert sequences_within(points, 0.05) is None


def test_a_closed_loop_is_compared_with_lockstep_and_other_waves():
    found = plan(scenario(), 4, Goal(sequences=512))
    assert found.best is not None
    own = [o for o in found.outcomes if o.option.schedule == "waves"]
    assert found.best.throughput >= 0.99 * max(o.throughput for o in own)
    assert {o.option.schedule for o in found.outcomes} == {"waves", "ep", "eplb", "tbo", "eplb+tbo"}
    assert {o.waves for o in own if o.option.waves} - {found.best.waves}
    assert all(o.sequences == 512 for o in found.outcomes)
    assert all(0 < (o.bound_share or 1) <= 1.02 for o in found.outcomes)


def test_more_devices_are_not_noticeably_worse():
    goal, kept = Goal(sequences=512), []
    for num_devices in (2, 4, 8):
        best = plan(scenario(), num_devices, goal, redundant=(0, 1), lockstep=()).best
        assert best is not None
        kept.append(best.throughput)
    assert kept[1] > 0.95 * kept[0]
    assert kept[2] > 0.95 * kept[1]


def test_a_rate_with_an_slo_takes_the_fewest_devices():
    what, space = scenario(), {"redundant": (0, 1), "disaggregated": False, "lockstep": ()}
    loose = plan(what, 8, Goal(rate=100.0, slo_itl=0.05), **space)
    tight = plan(what, 8, Goal(rate=100.0, slo_itl=0.004), **space)
    assert loose.best is not None and tight.best is not None
    assert loose.best.p99_itl <= 0.05 and tight.best.p99_itl <= 0.004
    assert loose.best.option.num_devices < tight.best.option.num_devices <= 8
    fewer = [o for o in tight.outcomes if o.option.num_devices < tight.best.option.num_devices]
    assert not any(o.meets(0.004) for o in fewer)


def test_an_slo_that_nothing_meets():
    found = plan(scenario(), 4, Goal(sequences=512, slo_itl=1e-4), lockstep=())
    assert found.best is None
    (line,) = recommendation(scenario(), found, "tiny")
    assert line.startswith("no placement keeps up and meets the SLO; the nearest is ")


def test_a_rate_that_nothing_sustains():
    found = plan(scenario(), 4, Goal(rate=1e5), redundant=(0,), disaggregated=False, lockstep=())
    assert found.best is None
    assert found.nearest.throughput == max(outcome.throughput for outcome in found.outcomes)


def test_a_sweep_finds_the_most_tokens_within_the_slo():
    space = {"redundant": (0,), "disaggregated": False, "lockstep": ()}
    free = plan(scenario(), 4, Goal(), **space)
    bound = plan(scenario(), 4, Goal(slo_itl=0.008), **space)
    assert free.best is not None and bound.best is not None
    assert bound.best.p99_itl <= 0.008 < free.best.p99_itl
    assert bound.best.throughput < free.best.throughput
    assert len({o.sequences for o in free.points}) >= 4


def test_a_slow_device_costs_throughput():
    even = Evaluator(scenario(), 4).closed(Option(num_devices=4), 512)
    slow = Evaluator(scenario(slow={1: 1.5}), 4).closed(Option(num_devices=4), 512)
    assert slow.throughput < even.throughput


def test_curves_are_of_the_devices_that_are_recommended():
    goal = Goal(rate=100.0, slo_itl=0.05)
    found = plan(scenario(), 8, goal, redundant=(0, 1), disaggregated=False, lockstep=("ep",), curves=True)
    assert found.best is not None
    over_load: dict[Option, set[int]] = {}
    for point in found.points:
        over_load.setdefault(replace(point.option, waves=None), set()).add(point.sequences)
    most = {option for option, loads in over_load.items() if len(loads) > 2}
    assert replace(found.best.option, waves=None) in most
    assert {option.num_devices for option in most} == {found.best.option.num_devices}


def test_runs_are_kept():
    evaluator = Evaluator(scenario(), 2)
    job = Job(option=Option(num_devices=2), sequences=32)
    assert job.run(evaluator) is job.run(evaluator)


# ---- flags


@pytest.mark.parametrize("option", [Option(num_devices=4, redundant=2), Option(num_devices=4, attention_devices=1)])
@pytest.mark.parametrize("goal", [Goal(sequences=1000), Goal(rate=1.0), Goal()])
def test_recommended_flags_are_those_of_the_engine(option, goal):
    found = outcome(option=option, sequences=1000, waves=3)
    what = scenario()
    template = plan(what, 2, Goal(sequences=8), redundant=(0,), disaggregated=False, lockstep=())
    flags = serve_flags(what, replace(template, goal=goal, best=found), found)
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    add_engine_flags(parser)
    config = engine_config(parser.parse_args(["MODEL", *flags]))
    assert config.placement.num_workers == 4
    assert len(config.placement.attention_ranks) == option.num_homes
    assert config.placement.redundant_experts == option.redundant
    assert config.scheduler.schedule == "waves"
    assert config.scheduler.num_waves == (None if goal == Goal() else 3)
    assert config.scheduler.max_num_seqs >= 1000 / option.num_homes


def test_known_models_have_options_on_known_devices():
    even = np.full((61, 256), 1 / 256)
    what = Scenario(sizes=model_sizes("deepseek-v3"), device=DEVICES["h100"], popularity=even, believed=even)
    assert least_devices(what) == 10
    assert most_sequences(what, Option(num_devices=16)) > 16


def test_no_wave_is_held_by_the_others_in_turn_for_ever():
    """One attention device has so much to do at the beginning of a pass that somebody is always close ahead."""
    figures = Evaluator(scenario(), 4).closed(Option(num_devices=4, attention_devices=1), 1331)
    assert figures is not None

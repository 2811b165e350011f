"""Hypothesis strategies: clusters, models and requests that hurt.

Hypothesis begins with the first of every list: it is one that hurts, not the smallest.
"""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import strategies as st

from amoe.config import CacheConfig, PlacementConfig, SchedulerConfig
from tests.unit.core.fake_model import ModelSpec
from tests.unit.core.scenario import PATIENT, Request, Scenario

PLACEMENTS = (
    PlacementConfig(),
    PlacementConfig(colocated=2),
    PlacementConfig(colocated=3),
    PlacementConfig(attention_workers=1, expert_workers=1),
    PlacementConfig(attention_workers=2, expert_workers=2),
    PlacementConfig(attention_workers=3, expert_workers=2),
)
WAVES = (("waves", 2), ("waves", 1), ("waves", 3), ("waves", None))  # None: another number after every iteration
SCHEDULES = (
    *(("fcfs", 1), ("flfs", 1), ("mtfs", 1), ("defrag", 1), ("progress", 1)),
    *(("lockstep", 1), ("lockstep", 2), ("lockstep", 3)),
    *WAVES,
)
FORWARD = (("forward", 1),)  # of one worker alone
LAYERS = tuple(
    tuple(letter == "s" for letter in word) for word in ("sds", "s", "ss", "ds", "sd", "sss", "dssd", "ssss")
)
VOCAB = 64


@st.composite
def models(draw):
    """Layers with experts (s) and without (d), a router from even to very skewed."""
    sparse_layers = draw(st.sampled_from(LAYERS))
    num_experts = draw(st.sampled_from([4, 3, 8]))
    skew = draw(st.sampled_from([18, 21, 0]))  # bits; the scores have 20
    bias = [draw(st.integers(0, 2**skew)) for _ in range(num_experts)]
    return ModelSpec(sparse_layers, draw(st.sampled_from([2, 1, 3])), tuple(bias), vocab=VOCAB)


@st.composite
def request_lists(draw, *, max_requests, max_prompt, max_tokens, aborts):
    """Requests whose prompts share beginnings, and which come together or one by one."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    stems = [[rng.randrange(VOCAB) for _ in range(max_prompt)] for _ in range(2)]
    spread = draw(st.sampled_from([50, 0, 600]))
    requests = []
    for request_id in range(draw(st.sampled_from([max_requests, max_requests, max_requests // 2, 2, 1]))):
        length = rng.randint(1, max_prompt)
        shared = rng.choice([0, length // 2, length - 1, length])
        prompt = rng.choice(stems)[:shared] + [rng.randrange(VOCAB) for _ in range(length - shared)]
        arrive = rng.randint(0, spread)
        abort = arrive + rng.randint(0, rng.choice([20, 300, 2000])) if aborts and rng.random() < 0.5 else None
        home, count, scored = rng.randrange(3), rng.randint(1, max_tokens), rng.random() < 0.3
        request = Request(request_id, home, tuple(prompt), count, arrive, abort, scored=scored)
        requests.append(replace(request, routed=rng.random() < 0.3, priority=rng.choice([0, 0, 3, -2])))
    return tuple(requests)


@st.composite
def with_siblings(draw, scenario):
    """The scenario with some of its requests in several choices, which come with the first or a little later.

    Some salt their cache; siblings have the first one's salt.
    """
    rng = random.Random(draw(st.integers(0, 2**32)))
    requests: list[Request] = []
    for first in scenario.requests:
        leader = replace(first, request_id=len(requests), salt=rng.choice(["", "", "a", "b"]))
        requests.append(leader)
        for _ in range(rng.choice([0, 1, 3])):
            arrive = leader.arrive + rng.choice([0, 0, 5, 100])
            abort = None if leader.abort is None else max(arrive, leader.abort + rng.randint(-50, 50))
            sibling = replace(
                leader,
                request_id=len(requests),
                sibling_of=leader.request_id,
                arrive=arrive,
                abort=rng.choice([None, abort]),
                max_tokens=rng.randint(1, 12),
                scored=rng.random() < 0.1,
                routed=rng.random() < 0.1,
            )
            requests.append(sibling)
    return replace(scenario, requests=tuple(requests))


@st.composite
def scenarios(
    draw,
    *,
    schedules=SCHEDULES,
    placements=PLACEMENTS,
    max_requests=8,
    max_prompt=60,
    max_tokens=12,
    aborts=False,
    duplicates=0.0,
    roomy=False,
    replicas=False,
):
    """Any cluster under any load. `roomy`: so much of everything that nobody is preempted; `replicas`: of experts."""
    schedule, count = draw(st.sampled_from(schedules))
    scheduler = SchedulerConfig(
        schedule=schedule,
        micro_batches=count if schedule == "lockstep" else 1,
        num_waves=count if schedule == "waves" else None,
        max_hold_s=draw(st.sampled_from([0.003, PATIENT, 0.03])) if schedule == "waves" else 1.0,
        max_num_seqs=8 if roomy else draw(st.sampled_from([3, 8, 8, 2, 1])),
        max_num_batched_tokens=256 if roomy else draw(st.sampled_from([8, 3, 32, 256, 1])),
        max_wait_s=draw(st.sampled_from([1e-4, 10.0])),
        scheduling_policy=draw(st.sampled_from(["fcfs", "fcfs", "priority"])),
    )
    cache = CacheConfig(
        block_size=draw(st.sampled_from([2, 1, 3, 4, 8])), enable_prefix_caching=not draw(st.booleans())
    )
    return Scenario(
        requests=draw(
            request_lists(max_requests=max_requests, max_prompt=max_prompt, max_tokens=max_tokens, aborts=aborts)
        ),
        spec=draw(models()),
        placement=draw(st.sampled_from(placements)),
        scheduler=scheduler,
        cache=cache,
        spare_blocks=1000 if roomy else draw(st.sampled_from([0, 1, 3, 6])),
        duplicates=duplicates,
        restless=schedule == "waves" and count is None,
        spare_slots=draw(st.sampled_from([2, 1, 8])) if replicas else 0,
        fickle=replicas,
        seed=draw(st.integers(0, 2**32)),
    )

"""A sequence that has begun at one home goes on at another, cut anywhere: what follows is what would have followed."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher

from amoe.config import CacheConfig, EngineConfig, PlacementConfig, SchedulerConfig
from amoe.engine.messages import AddRequest
from amoe.types import SamplingParams
from tests.checkpoints import make_checkpoint
from tests.cluster import Finished, InprocCluster

BLOCK_SIZE = 4
MAX_TOKENS = 10
PROMPT = [3 + (7 * index * index) % 97 for index in range(19)]
NUM_LAYERS, NUM_PAIRS = 2, 3
TOKEN_BYTES = 2 * NUM_LAYERS * NUM_PAIRS


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("resume"), "qwen3_moe", seed=0, eos_token_id=2)


def make_config(path: Path, *, caching: bool = False, schedule: str = "waves") -> EngineConfig:
    return EngineConfig(
        model=str(path),
        dtype="float32",
        threads_per_worker=1,
        max_model_len=64,
        placement=PlacementConfig(colocated=2),
        scheduler=SchedulerConfig(schedule=schedule, max_num_seqs=16, max_num_batched_tokens=16),
        cache=CacheConfig(block_size=BLOCK_SIZE, num_blocks=300, enable_prefix_caching=caching),
    )


def resume(cluster: InprocCluster, request: AddRequest, home: int = 1) -> int:
    """Send it, and remember what comes of it under a number of its own."""
    cluster.requests[request.request_id] = Finished()
    cluster._home_of[request.request_id] = home
    cluster.controls[home].inbox.append(request)
    return request.request_id


def cut(whole: Finished, count: int, params: SamplingParams, request_id: int) -> AddRequest:
    """As the server sends it once `count` tokens have been told."""
    num_routed = len(PROMPT) + count - 1 if count and params.return_routed_experts else 0
    tokens = [*PROMPT, *whole.token_ids[:count]]
    return AddRequest(request_id, tokens, params, None, num_generated=count, num_routed=num_routed)


def params_of(**options: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": MAX_TOKENS, "temperature": 0.0, **options})


@dataclass(frozen=True)
class Case:
    """One set of options; `tokens` of the undisturbed run may be needed to choose them."""

    name: str
    options: dict[str, Any]


RANDOM = {"temperature": 1.3, "seed": 11}
CASES = (
    Case("greedy", {}),
    Case("random", RANDOM),
    Case("top_p", RANDOM | {"top_p": 0.8, "min_p": 0.02}),
    Case("top_k", RANDOM | {"top_k": 20}),
    Case("penalties", RANDOM | {"presence_penalty": 1.5, "frequency_penalty": -1.0}),
    Case("repetition", {"repetition_penalty": 1.7}),
    Case("bias", RANDOM | {"logit_bias": ((5, 8.0), (9, 8.0), (12, -100.0))}),
    Case("allowed", RANDOM | {"allowed_token_ids": (5, 6, 7, 8, 9)}),
    Case("bad words", RANDOM | {"allowed_token_ids": (5, 6, 7), "bad_words": ((5, 6), (6, 7, 7), (7, 5))}),
    Case("min_tokens", RANDOM | {"allowed_token_ids": (2, 5, 6), "min_tokens": 7}),
    Case("stop ids", RANDOM | {"seed": 3, "allowed_token_ids": tuple(range(5, 13)), "stop_token_ids": (9,)}),
    Case("logprobs", RANDOM | {"logprobs": 3}),
    Case("prompt logprobs", {"prompt_logprobs": 2, "logprobs": 0}),
    Case("grammar", RANDOM | {"grammar": LLMatcher.grammar_from_regex("[a-f]{3}(x[0-9]{2}y)*[A-Z]{8}")}),
    Case("short grammar", RANDOM | {"grammar": LLMatcher.grammar_from_regex("[a-f]{4}")}),
    Case("routed experts", {"return_routed_experts": True}),
    Case("all told", RANDOM | {"return_routed_experts": True, "prompt_logprobs": 1, "logprobs": 1}),
)


@functools.cache
def undisturbed(path: Path, caching: bool) -> dict[str, Finished]:
    """What each case gives when nothing happens."""
    cluster = InprocCluster(make_config(path, caching=caching))
    ids = {case.name: cluster.add(PROMPT, params_of(**case.options), home=0) for case in CASES}
    cluster.run()
    cluster.assert_nothing_left()
    cluster.close()
    return {name: cluster.requests[request_id] for name, request_id in ids.items()}


@pytest.mark.parametrize("caching", [False, True])
def test_the_cases_are_as_meant(path, caching):
    whole = undisturbed(path, caching)
    assert all(item.finish_reason in ("stop", "length") for item in whole.values())
    assert whole["stop ids"].finish_reason == "stop"
    assert len(whole["stop ids"].token_ids) > 2
    assert whole["min_tokens"].finish_reason == "stop"
    assert len(whole["min_tokens"].token_ids) >= 7
    assert whole["short grammar"].finish_reason == "stop"
    assert whole["greedy"].token_ids != whole["random"].token_ids
    assert len(whole["routed experts"].routed_experts) == (len(PROMPT) + MAX_TOKENS - 1) * TOKEN_BYTES


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cut_anywhere_it_goes_on_as_if_nothing_had_happened(path, case, caching):
    whole, params = undisturbed(path, caching)[case.name], params_of(**case.options)
    cluster = InprocCluster(make_config(path, caching=caching))
    counts = range(len(whole.token_ids))
    for count in counts:
        resume(cluster, cut(whole, count, params, 100 + count))
    cluster.run()
    cluster.assert_nothing_left()
    cluster.close()
    for count in counts:
        check_rest(whole, count, cluster.requests[100 + count], params)


def check_rest(whole: Finished, count: int, rest: Finished, params: SamplingParams) -> None:
    """`rest` is what was left to be told of `whole` after `count` tokens."""
    assert rest.token_ids == whole.token_ids[count:]
    assert rest.finish_reason == whole.finish_reason
    expected = [item.logprob for item in whole.logprobs[count:]]
    assert [item.logprob for item in rest.logprobs] == pytest.approx(expected, abs=1e-4)
    assert [item.top_ids for item in rest.logprobs] == [item.top_ids for item in whole.logprobs[count:]]
    told = [item.logprob for item in whole.prompt_logprobs] if count == 0 else []
    assert [item.logprob for item in rest.prompt_logprobs] == pytest.approx(told, abs=1e-4)
    if params.return_routed_experts:
        num_told = 0 if count == 0 else len(PROMPT) + count - 1
        experts = np.frombuffer(whole.routed_experts, "<i2").reshape(-1, NUM_LAYERS, NUM_PAIRS)[num_told:]
        again = np.frombuffer(rest.routed_experts, "<i2").reshape(-1, NUM_LAYERS, NUM_PAIRS)
        assert np.array_equal(np.sort(again, axis=-1), np.sort(experts, axis=-1))


def test_the_seed_of_a_request_that_brings_none_goes_with_it(path):
    params = params_of(temperature=1.5)
    first = InprocCluster(make_config(path))
    whole = first.requests[first.add(PROMPT, params, home=0)]
    first.run()
    first.close()
    second = InprocCluster(make_config(path))
    resume(second, cut(whole, 4, params, 0))
    second.run()
    second.close()
    check_rest(whole, 4, second.requests[0], params)


@pytest.mark.parametrize("caching", [False, True])
def test_resumed_choices_share_the_prompt(path, caching):
    """All of them begun, at different places: the first one's KV of the prompt serves all, and changes nothing."""
    params = [params_of(temperature=1.0, seed=seed, ignore_eos=True) for seed in range(4)]
    first = InprocCluster(make_config(path, caching=caching))
    ids = [first.add(PROMPT, item, home=0) for item in params]
    first.run()
    first.close()
    second = InprocCluster(make_config(path, caching=caching))
    for index, request_id in enumerate(ids):
        request = cut(first.requests[request_id], 3 * (index % 3), params[index], request_id)
        sibling_of = None if index == 0 else ids[0]
        told = (request.num_generated, request.num_routed)
        resume(second, AddRequest(request_id, request.prompt_token_ids, params[index], sibling_of, *told))
    second.run()
    second.assert_nothing_left()
    second.close()
    for index, request_id in enumerate(ids):
        check_rest(first.requests[request_id], 3 * (index % 3), second.requests[request_id], params[index])
    assert sum(second.requests[request_id].num_cached_tokens > 0 for request_id in ids[1:]) >= 2


def test_who_has_begun_goes_before_those_that_wait(path):
    cluster = InprocCluster(make_config(path))
    whole = undisturbed(path, False)["greedy"]
    params = params_of()
    waiting = [cluster.add(PROMPT, params, home=1) for _ in range(40)]
    resumed = resume(cluster, cut(whole, 2, params, 100))
    while cluster.requests[resumed].finish_reason is None:
        cluster.turn()
    assert sum(cluster.requests[request_id].finish_reason is None for request_id in waiting) >= 20
    cluster.run()
    cluster.close()
    check_rest(whole, 2, cluster.requests[resumed], params)


@pytest.mark.parametrize(("tokens", "num_generated"), [([], 0), ([5, 6], 2), ([5] * 60, 1)])
def test_what_the_server_should_never_send_ends_with_an_error(path, tokens, num_generated):
    cluster = InprocCluster(make_config(path))
    request = AddRequest(7, tokens, params_of(), None, num_generated=num_generated)
    resume(cluster, request)
    cluster.run()
    cluster.assert_nothing_left()
    cluster.close()
    assert cluster.requests[7].finish_reason == "error"

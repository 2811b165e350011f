"""Choices of one prompt share its KV: it is computed once, and every choice gets the tokens that it gets alone."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest

from amoe.config import CacheConfig, EngineConfig, PlacementConfig, SchedulerConfig
from amoe.types import SamplingParams
from tests.checkpoints import make_checkpoint
from tests.cluster import Finished, InprocCluster

BLOCK_SIZE = 16
NUM_CHOICES = 8
PROMPT = [3 + (7 * index * index) % 97 for index in range(500)]


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("siblings"), "qwen3_moe", seed=0, max_position_embeddings=1024)


def make_config(
    path: Path,
    *,
    caching: bool = True,
    num_blocks: int = 400,
    rows: int = 16,
    schedule: str = "waves",
    max_model_len: int = 600,
) -> EngineConfig:
    return EngineConfig(
        model=str(path),
        dtype="float32",
        threads_per_worker=1,
        max_model_len=max_model_len,
        placement=PlacementConfig(colocated=1 if schedule == "forward" else 2),
        scheduler=SchedulerConfig(schedule=schedule, max_num_seqs=rows, max_num_batched_tokens=128),
        cache=CacheConfig(block_size=BLOCK_SIZE, num_blocks=num_blocks, enable_prefix_caching=caching),
    )


def params_of(choice: int, **others: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 10, "temperature": 1.0, "seed": 100 + choice, "ignore_eos": True, **others})


@functools.cache
def alone(path: Path, length: int) -> list[list[int]]:
    """The tokens of each choice, computed in a cluster that shares nothing."""
    cluster = InprocCluster(make_config(path, caching=False))
    ids = [cluster.add(PROMPT[:length], params_of(choice)) for choice in range(NUM_CHOICES)]
    cluster.run()
    cluster.close()
    return [cluster.requests[request_id].token_ids for request_id in ids]


def tokens_computed(cluster: InprocCluster) -> int:
    """That have entered the model at any worker."""
    total = 0.0
    for worker in cluster.workers:
        snapshot = worker.stats.snapshot(worker.core, 0.0).iteration_tokens
        total += 0.0 if snapshot is None else snapshot.total
    return int(total)


def start(cluster: InprocCluster, length: int, **others: object) -> list[int]:
    first = cluster.add(PROMPT[:length], params_of(0, **others))
    rest = [cluster.add(PROMPT[:length], params_of(c, **others), sibling_of=first) for c in range(1, NUM_CHOICES)]
    return [first, *rest]


def results(cluster: InprocCluster, ids: list[int]) -> list[Finished]:
    return [cluster.requests[request_id] for request_id in ids]


@pytest.mark.parametrize("length", [500, 497, 33, 16, 5])
@pytest.mark.parametrize("caching", [True, False])
def test_the_prompt_is_computed_once(caching: bool, length: int, path: Path) -> None:
    """A choice computes what the last block of the prompt holds in part, and at least one token."""
    cluster = InprocCluster(make_config(path, caching=caching))
    ids = start(cluster, length, cache_salt="salt" if length % 2 else "")
    cluster.run()
    assert [result.token_ids for result in results(cluster, ids)] == alone(path, length)
    num_shared = (length - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert [result.num_cached_tokens for result in results(cluster, ids)] == [0] + [num_shared] * (NUM_CHOICES - 1)
    num_prompt_tokens = length + (NUM_CHOICES - 1) * (length - num_shared)
    assert tokens_computed(cluster) == num_prompt_tokens + NUM_CHOICES * 9, "nine of ten tokens go in again"
    cluster.assert_nothing_left()
    cluster.close()


def test_without_a_prefix_cache_others_find_nothing(path: Path) -> None:
    cluster = InprocCluster(make_config(path, caching=False))
    ids = start(cluster, 200)
    stranger = cluster.add(PROMPT[:200], params_of(1), home=0)
    cluster.run()
    later = cluster.add(PROMPT[:200], params_of(2), home=0)
    cluster.run()
    assert [cluster.requests[i].num_cached_tokens for i in (stranger, later)] == [0, 0]
    assert [cluster.requests[i].token_ids for i in (*ids, stranger, later)] == [
        *alone(path, 200),
        alone(path, 200)[1],
        alone(path, 200)[2],
    ]
    cluster.assert_nothing_left()
    cluster.close()


def test_a_salt_hides_a_prompt_from_all_others(path: Path) -> None:
    cluster = InprocCluster(make_config(path))

    def ask(salt: str) -> int:
        (result,) = cluster.generate([PROMPT[:200]], params_of(0, cache_salt=salt))
        assert result.token_ids == alone(path, 200)[0]
        return result.num_cached_tokens

    homes = len(cluster.config.placement.attention_ranks)
    found = [ask(salt) for salt in ("alice", "alice", "bob", "bob", "", "", "alice", "alice") for _ in range(homes)]
    # Requests go to the homes in turn: a salt is new at each of them once.
    assert found[::homes] == [0, 192, 0, 192, 0, 192, 192, 192]
    cluster.close()


@pytest.mark.parametrize("turns", [0, 5, 15, 40])
@pytest.mark.parametrize("caching", [True, False])
def test_the_first_choice_goes_at_any_time(caching: bool, turns: int, path: Path) -> None:
    """In the middle of its prompt, or later: the others compute what is missing."""
    cluster = InprocCluster(make_config(path, caching=caching))
    ids = start(cluster, 400)
    for _ in range(turns):
        cluster.turn()
    cluster.abort(ids[0])
    cluster.run()
    assert [result.token_ids for result in results(cluster, ids[1:])] == alone(path, 400)[1:]
    cluster.assert_nothing_left()
    cluster.close()


@pytest.mark.parametrize("schedule", ["waves", "lockstep", "progress", "forward"])
@pytest.mark.parametrize("caching", [True, False])
def test_too_little_room_for_all(caching: bool, schedule: str, path: Path) -> None:
    """Few blocks and rows: choices wait, are preempted, come back; strangers with the same prompt come between."""
    cluster = InprocCluster(
        make_config(path, caching=caching, num_blocks=17, rows=6, schedule=schedule, max_model_len=210)
    )
    ids = start(cluster, 200)
    strangers = [cluster.add(PROMPT[:200], params_of(choice), home=0) for choice in range(3)]
    cluster.run()
    assert [result.token_ids for result in results(cluster, ids)] == alone(path, 200)
    assert [result.token_ids for result in results(cluster, strangers)] == alone(path, 200)[:3]
    assert cluster.workers[0].core.batcher.num_preemptions > 0
    cluster.assert_nothing_left()
    cluster.close()


def test_choices_that_ask_what_the_prompt_said_compute_it_themselves(path: Path) -> None:
    cluster = InprocCluster(make_config(path))
    ids = start(cluster, 200, prompt_logprobs=0)
    cluster.run()
    assert [result.token_ids for result in results(cluster, ids)] == alone(path, 200)
    assert {len(result.prompt_logprobs) for result in results(cluster, ids)} == {199}
    assert tokens_computed(cluster) == NUM_CHOICES * (200 + 9)
    cluster.close()


def test_times_are_told_with_the_first_and_the_last_token(path: Path) -> None:
    cluster = InprocCluster(make_config(path, rows=2))
    ids = [cluster.add(PROMPT[:40], params_of(choice), home=0) for choice in range(4)]
    cluster.run()
    for result in results(cluster, ids):
        assert len(result.times) == 2
        assert result.times[0] == result.times[1]
        assert result.times[0].queue_s >= 0
        assert result.times[0].prefill_s > 0
    queues = [result.times[0].queue_s for result in results(cluster, ids)]
    assert max(queues[:2]) < min(queues[2:]), "two rows: the others wait until somebody has ended"
    (single,) = cluster.generate([PROMPT[:5]], replace(params_of(0), max_tokens=1))
    assert len(single.times) == 1
    cluster.close()

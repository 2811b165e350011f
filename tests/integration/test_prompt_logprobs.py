"""Log-probabilities of prompts equal the dense oracle's, whatever the schedule, the placement and the memory.

Some of the requests of a batch ask for them and some do not.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from amoe.engine import sampler
from amoe.models.config import load_model_config
from amoe.models.loader import Blocks, load_model
from amoe.models.reference import forward
from amoe.types import TokenLogprobs
from tests.cluster import InprocCluster
from tests.integration.exactness import (
    BUILTIN,
    FEATURES,
    PLACEMENTS,
    Case,
    checkpoint,
    expected,
    make_cases,
    make_prompts,
)
from tests.pairwise import pairwise

NUM_TOP = 3
TOLERANCE = 1e-4
CASES = make_cases(
    pairwise(
        {
            "schedule": ("waves", "lockstep", "progress"),
            "count": (0, 2, 3),
            "arch": ("qwen2_moe", "qwen3_moe", "mixtral", BUILTIN),
            "placement": list(PLACEMENTS),
            "feature": FEATURES,
            "variant": (0, 1),
            "replicas": (2, 0),
        }
    )
)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scored")


@functools.cache
def oracle(root: Path, arch: str, variant: int) -> list[torch.Tensor]:
    """[T - 1, V] log-probabilities behind the tokens of each prompt, by the dense reference."""
    path = checkpoint(root, arch, variant)
    config = load_model_config(path)
    model = load_model(path, config, Blocks.whole(config), dtype=torch.float32, device="cpu")
    with torch.inference_mode():
        return [torch.log_softmax(forward(model, ids), dim=-1)[:-1] for ids in make_prompts(arch, variant)]


def assert_equals(told: list[TokenLogprobs], prompt: list[int], logprobs: torch.Tensor, where: str) -> None:
    """One per prompt token but the first, each within the tolerance."""
    assert len(told) == len(prompt) - 1, where
    for position, entry in enumerate(told):
        row = logprobs[position]
        assert abs(entry.logprob - float(row[prompt[position + 1]])) < TOLERANCE, f"{where}, position {position}"
        best = row.topk(NUM_TOP).values.tolist()
        assert entry.top_logprobs == pytest.approx(best, abs=TOLERANCE), f"{where}, position {position}"
        assert [float(row[i]) for i in entry.top_ids] == pytest.approx(best, abs=TOLERANCE)


def run(case: Case, root: Path, cluster: InprocCluster) -> None:
    """All prompts of the case; two of three are scored."""
    scored = replace(case.params, prompt_logprobs=NUM_TOP)
    ids = [cluster.add(prompt, case.params if i % 3 == 1 else scored) for i, prompt in enumerate(case.prompts)]
    cluster.run()
    logprobs, greedy = oracle(root, case.arch, case.variant), expected(root, case.arch, case.variant)
    for index, request_id in enumerate(ids):
        result, where = cluster.requests[request_id], f"{case}, prompt {index}"
        assert result.token_ids == greedy[index].token_ids, where
        if index % 3 == 1:
            assert result.prompt_logprobs == []
        else:
            assert_equals(result.prompt_logprobs, case.prompts[index], logprobs[index], where)
            assert result.num_cached_tokens == 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_they_are_the_oracles(case: Case, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "_SCORE_CHUNK", 5 * 4096)  # several slices per chunk, for large vocabularies
    cluster = InprocCluster(case.config(checkpoint(root, case.arch, case.variant)))
    run(case, root, cluster)
    if "cached" in case.feature:  # what was scored before fills the prefix cache
        run(case, root, cluster)
    batchers = [worker.core.batcher for worker in cluster.workers if worker.core.batcher]
    if "preempted" in case.feature:
        assert sum(batcher.num_preemptions for batcher in batchers) > 0
    cluster.assert_nothing_left()
    cluster.close()


@pytest.mark.parametrize("schedule", [("waves", 2), ("progress", 1)], ids=str)
def test_a_prompt_alone(schedule: tuple[str, int], root: Path) -> None:
    """`max_tokens` 0: no token comes, and the sequence ends like any other, even after a single token."""
    case = Case(*schedule, "qwen3_moe", "colocated2", "plain", 0)
    cluster = InprocCluster(case.config(checkpoint(root, case.arch, case.variant)))
    params = replace(case.params, max_tokens=0, prompt_logprobs=NUM_TOP)
    logprobs = oracle(root, case.arch, case.variant)
    for index, result in enumerate(cluster.generate(case.prompts, params)):
        assert (result.token_ids, result.logprobs, result.finish_reason) == ([], [], "length")
        assert_equals(result.prompt_logprobs, case.prompts[index], logprobs[index], f"prompt {index}")
    (shortest,) = cluster.generate([[5]], params)
    assert (shortest.prompt_logprobs, shortest.finish_reason) == ([], "length")
    cluster.assert_nothing_left()
    cluster.close()


@pytest.mark.parametrize("turns", range(1, 40, 4))
def test_aborted_at_any_time(turns: int, root: Path) -> None:
    case = Case("waves", 2, "qwen3_moe", "2A2E", "plain", 0)
    cluster = InprocCluster(case.config(checkpoint(root, case.arch, case.variant)))
    params = replace(case.params, prompt_logprobs=0)
    ids = [cluster.add(prompt, params) for prompt in case.prompts]
    for _ in range(turns):
        cluster.turn()
    for request_id in ids[::2]:
        cluster.abort(request_id)
    cluster.run()
    for index, request_id in enumerate(ids):
        if index % 2:
            assert len(cluster.requests[request_id].prompt_logprobs) == len(case.prompts[index]) - 1
    cluster.assert_nothing_left()
    cluster.close()

"""Which experts tokens took is what the dense oracle's router says: schedules × placements × chunks × preemption."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from amoe.config import CapacityConfig
from amoe.models.config import load_model_config
from amoe.models.loader import load_model
from amoe.models.model import Blocks
from amoe.models.reference import forward
from tests.cluster import InprocCluster
from tests.integration.exactness import FEATURES, NUM_NEW, PLACEMENTS, Case, checkpoint, expected, make_cases
from tests.pairwise import pairwise

FACTORS = {
    "schedule": ("waves", "lockstep", "progress"),
    "count": (0, 2, 3),
    "arch": ("qwen2_moe", "qwen3_moe", "olmoe"),
    "placement": list(PLACEMENTS),
    "feature": FEATURES,
    "variant": (0, 1),
    "replicas": (2, 0),
}
FORWARD = {**FACTORS, "schedule": ("forward",), "count": (1,), "placement": ("1",), "replicas": (0,)}
CASES = make_cases([*pairwise(FACTORS), *pairwise(FORWARD)])


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("routed")


@functools.cache
def oracle(root: Path, arch: str, variant: int, index: int) -> np.ndarray:
    """[T, L, K] experts of prompt `index` and its greedy answer, best first; the last token goes nowhere."""
    path = checkpoint(root, arch, variant)
    config = load_model_config(path)
    model = load_model(path, config, Blocks.whole(config), dtype=torch.float32, device="cpu")
    told: list[torch.Tensor] = []

    def on_experts(layer: int, x: torch.Tensor) -> None:
        router = model.weights.attention[layer].router
        assert router is not None
        told.append(torch.softmax(x @ router.float().T, dim=-1).topk(config.top_k).indices)

    prompt = Case("waves", 0, arch, "1", "plain", variant).prompts[index]
    with torch.inference_mode():
        forward(model, prompt + expected(root, arch, variant)[index].token_ids[:-1], on_experts)
    return torch.stack(told, dim=1).numpy()


def told_of(raw: bytes, like: np.ndarray) -> np.ndarray:
    return np.frombuffer(raw, "<i2").reshape(-1, *like.shape[1:])


def run(case: Case, root: Path, cluster: InprocCluster) -> None:
    """All prompts; two of three ask, one of these for the prompt's log-probabilities besides."""
    path = checkpoint(root, case.arch, case.variant)
    is_last_sparse = load_model_config(path).sparse_layers[-1]
    asking = replace(case.params, return_routed_experts=True)
    kinds = (asking, case.params, replace(asking, prompt_logprobs=0))
    ids = [cluster.add(prompt, kinds[index % 3]) for index, prompt in enumerate(case.prompts)]
    cluster.run()
    greedy = expected(root, case.arch, case.variant)
    for index, request_id in enumerate(ids):
        result, where = cluster.requests[request_id], f"{case}, prompt {index}"
        assert result.token_ids == greedy[index].token_ids, where
        if index % 3 == 1:
            assert result.routed_experts == b""
            continue
        assert result.num_cached_tokens == 0
        wanted = oracle(root, case.arch, case.variant, index).copy()
        if is_last_sparse and index % 3 == 0:  # nobody asks what the prompt's experts of the last layer say
            wanted[: len(case.prompts[index]) - 1, -1] = -1
        told = told_of(result.routed_experts, wanted)
        assert len(told) == len(case.prompts[index]) + NUM_NEW - 1, where
        assert told.tolist() == wanted.tolist(), where


@pytest.mark.parametrize("case", CASES, ids=str)
def test_they_are_the_oracles(case: Case, root: Path) -> None:
    cluster = InprocCluster(case.config(checkpoint(root, case.arch, case.variant)))
    run(case, root, cluster)
    if "cached" in case.feature:  # those who did not ask have filled the prefix cache
        run(case, root, cluster)
    if "preempted" in case.feature:
        batchers = [worker.core.batcher for worker in cluster.workers if worker.core.batcher]
        assert sum(batcher.num_preemptions for batcher in batchers) > 0
        preempted = [request for request in cluster.requests.values() if request.times[-1].num_preemptions]
        assert preempted
        assert all(request.times[0].queue_s >= 0 and request.times[0].prefill_s >= 0 for request in preempted)
    cluster.assert_nothing_left()
    cluster.close()


@pytest.mark.parametrize("mode", ["drop", "reroute", "expanded"])
def test_under_capacity_they_are_those_that_compute(mode: str, root: Path) -> None:
    """As many are missing as the response says were dropped, as many new as were rerouted; exact requests keep all."""
    case = Case("progress", 1, "qwen3_moe", "colocated2", "plain", 0)
    expanded = mode == "expanded"
    capacity = CapacityConfig(factor=0.5, mode=mode, phase="both", exceed_top_k=expanded)
    path = checkpoint(root, case.arch, case.variant)
    config = load_model_config(path)
    num_pairs = capacity.pairs_per_token(config.top_k, config.num_experts)
    cluster = InprocCluster(replace(case.config(path), capacity=capacity))
    asking = replace(case.params, return_routed_experts=True, prompt_logprobs=0)
    ids = [
        cluster.add(prompt, asking if index % 2 else replace(asking, capacity="exact"))
        for index, prompt in enumerate(case.prompts)
    ]
    cluster.run()
    num_dropped = 0
    for index, request_id in enumerate(ids):
        result = cluster.requests[request_id]
        told = np.frombuffer(result.routed_experts, "<i2").reshape(-1, sum(config.sparse_layers), num_pairs)
        assert len(told) == len(case.prompts[index]) + NUM_NEW - 1
        taken = np.sort(told, axis=-1)
        assert not ((np.diff(taken) == 0) & (taken[..., 1:] >= 0)).any(), "an expert computes a token once"
        usage = result.capacity
        assert usage is not None
        if not expanded:
            assert usage.pairs == told.size
            assert (told < 0).sum() == usage.pairs_dropped
        num_dropped += usage.pairs_dropped
        if index % 2 == 0:
            wanted = oracle(root, case.arch, case.variant, index)
            assert (told[..., config.top_k :] == -1).all()
            # What the others lose changes nothing here. All of it goes through the last experts, as it is scored.
            assert told[..., : config.top_k].tolist() == wanted.tolist()
    assert num_dropped > 0
    cluster.assert_nothing_left()
    cluster.close()

"""Capacity with real models: exact requests equal transformers', token for token, beside best-effort ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from amoe.config import CapacityConfig
from amoe.models import reference
from amoe.models.config import load_model_config
from amoe.models.layers import MlpWeights
from amoe.models.loader import load_model
from amoe.models.model import Blocks
from amoe.policy import capacity_reference as slow
from amoe.types import CapacityUsage, SamplingParams
from tests.cluster import Finished, InprocCluster
from tests.integration.exactness import Case, checkpoint, expected

TIGHT = {"factor": 0.5, "phase": "both", "keep_best": False}


@dataclass(frozen=True)
class Setting:
    """One cluster with one capacity."""

    case: Case
    capacity: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.case}-" + "-".join(str(value) for value in self.capacity.values())


SETTINGS = (
    Setting(Case("waves", 2, "mixtral", "colocated2", "cached", 0), TIGHT),
    Setting(Case("waves", 0, "qwen3_moe", "2A2E", "cached", 0, 2), {**TIGHT, "mode": "reroute"}),
    Setting(
        Case("lockstep", 2, "olmoe", "colocated2", "preempted", 0), {**TIGHT, "mode": "reroute", "scope": "device"}
    ),
    Setting(Case("progress", 1, "qwen2_moe", "2A2E", "cached", 0), {**TIGHT, "mode": "expanded"}),
    Setting(
        Case("progress", 1, "mixtral", "colocated2", "plain", 0, 2),
        {**TIGHT, "mode": "expanded", "exceed_top_k": True},
    ),
    Setting(Case("defrag", 1, "olmoe", "1A1E", "cached", 0), {**TIGHT, "metric": "random"}),
    Setting(Case("waves", 1, "builtin", "colocated2", "cached", 0), {"factor": 1.0, "phase": "prefill"}),
    Setting(Case("progress", 1, "olmoe", "2A2E", "plain", 0), {"slack_s": 0.0, "mode": "drop", "phase": "both"}),
    Setting(Case("waves", 2, "olmoe", "2A2E", "cached", 0), {"slack_s": 0.0, "mode": "reroute", "phase": "both"}),
)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("capacity")


def run(setting: Setting, root: Path, seed: int = 0) -> tuple[list[Finished], list[Finished]]:
    """Every prompt as a best-effort and as an exact request, side by side, twice: the second time it may be cached."""
    case = setting.case
    config = case.config(checkpoint(root, case.arch, case.variant))
    cluster = InprocCluster(replace(config, capacity=CapacityConfig(**setting.capacity)), seed=seed)
    exact, best_effort = [], []
    for _ in range(2 if "cached" in case.feature else 1):
        numbers = []
        for prompt in case.prompts:
            for choice in ("best_effort", "exact"):
                numbers.append(cluster.add(prompt, replace(case.params, capacity=choice)))
        cluster.run()
        results = [cluster.requests[number] for number in numbers]
        best_effort, exact = best_effort + results[::2], exact + results[1::2]
    cluster.assert_nothing_left()
    cluster.close()
    return exact, best_effort


def total(results: list[Finished]) -> CapacityUsage:
    usages = [result.capacity for result in results]
    return CapacityUsage(
        sum(usage.pairs for usage in usages),
        sum(usage.pairs_dropped for usage in usages),
        sum(usage.pairs_rerouted for usage in usages),
        max(usage.gate_mass_lost for usage in usages),
    )


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_exact_requests_are_untouched(setting: Setting, root: Path) -> None:
    exact, best_effort = run(setting, root)
    references = expected(root, setting.case.arch, setting.case.variant)
    for number, result in enumerate(exact):
        reference = references[number % len(references)]
        assert result.token_ids == reference.token_ids, f"prompt {number}"
        worst = max(abs(a.logprob - b) for a, b in zip(result.logprobs, reference.logprobs, strict=True))
        assert worst < 1e-4
    untouched, touched = total(exact), total(best_effort)
    assert (untouched.pairs_dropped, untouched.pairs_rerouted, untouched.gate_mass_lost) == (0, 0, 0)
    assert untouched.pairs > 0 and touched.pairs > 0
    mode = setting.capacity.get("mode", "drop")
    assert touched.pairs_dropped + touched.pairs_rerouted > 0
    if mode == "drop":
        assert touched.pairs_rerouted == 0
    assert 0 < touched.gate_mass_lost < 1


def test_an_offline_run_is_reproducible(root: Path) -> None:
    """The same requests in the same order of events: the same drops, also the random ones."""
    setting = SETTINGS[5]
    first, second = (run(setting, root, seed=3)[1] for _ in range(2))
    assert [result.token_ids for result in first] == [result.token_ids for result in second]
    assert [result.capacity for result in first] == [result.capacity for result in second]


def test_marked_spans_lose_first(root: Path) -> None:
    """A capacity that drops only some pairs: those of marked tokens, and not those of the others."""
    case = replace(SETTINGS[0].case, feature="plain")
    config = replace(case.config(checkpoint(root, case.arch, 0)), capacity=CapacityConfig(factor=0.8))
    lost = []
    for marked in (0, 1):
        cluster = InprocCluster(config)
        prompts = [case.prompts[7], case.prompts[6]]
        params = [SamplingParams(max_tokens=2), SamplingParams(max_tokens=2)]
        params[marked] = SamplingParams(max_tokens=2, droppable_spans=((0, len(prompts[marked])),))
        numbers = [cluster.add(prompt, item, home=0) for prompt, item in zip(prompts, params, strict=True)]
        cluster.run()
        lost.append([cluster.requests[number].capacity.pairs_dropped for number in numbers])
        cluster.close()
    assert lost[0][0] > lost[1][0] and lost[1][1] > lost[0][1]


@pytest.mark.parametrize("spread_mass", [True, False])
@pytest.mark.parametrize("mode", ["drop", "reroute"])
def test_what_is_left_is_computed_right(mode: str, spread_mass: bool, root: Path, monkeypatch: Any) -> None:
    """A prompt in one micro-batch, against the dense oracle with the same pairs and weights."""
    case = Case("progress", 1, "mixtral", "1", "plain", 0)
    path = checkpoint(root, case.arch, case.variant)
    capacity = CapacityConfig(factor=1.0, mode=mode, spread_mass=spread_mass)
    config = replace(case.config(path), capacity=capacity, max_model_len=64)
    config = replace(config, scheduler=replace(config.scheduler, max_num_batched_tokens=64))
    prompt = [3 + 7 * i % 97 for i in range(40)]
    cluster = InprocCluster(config)
    number = cluster.add(prompt, SamplingParams(max_tokens=1, temperature=0.0, logprobs=1))
    cluster.run()
    cluster.close()
    result = cluster.requests[number]
    assert result.capacity.pairs_dropped + result.capacity.pairs_rerouted > 10

    model_config = load_model_config(path)
    model = load_model(path, model_config, Blocks.whole(model_config), dtype=torch.float32, device=torch.device("cpu"))
    layers = iter(range(model_config.num_layers))

    def capped_moe(x: torch.Tensor, router: torch.Tensor, experts: Any, model_config: Any) -> torch.Tensor:
        # In the last layer only the last token goes on, alone in its batch.
        rows = [len(x) - 1] if next(layers) == model_config.num_layers - 1 else list(range(len(x)))
        scores = torch.softmax(router.float() @ x[rows].T, dim=0).T
        problem = slow.Problem(
            scores.topk(model_config.top_k).indices.tolist(),
            lambda token, expert: float(scores[token, expert]),
            [True] * len(rows),
            lambda token, expert: expert,
            [slow.capacity(1.0, len(rows), model_config.top_k, model_config.num_experts)] * model_config.num_experts,
        )
        kept, _ = slow.drop(problem) if mode == "drop" else slow.reroute(problem, model_config.num_experts)
        out = torch.zeros_like(x)
        for token, row in enumerate(rows):
            mine = [expert for pair_token, expert in kept if pair_token == token]
            over = mine if spread_mass or set(mine) == set(problem.topk[token]) else problem.topk[token]
            for expert in mine:
                weight = scores[token, expert] / scores[token, over].sum()
                local = experts.ids.index(expert)
                out[row] += weight * reference._mlp(x[row], MlpWeights(experts.w13[local], experts.w2[local]))
        return out

    monkeypatch.setattr(reference, "_moe", capped_moe)
    with torch.inference_mode():
        logits = reference.forward(model, prompt)[-1]
    assert result.token_ids == [int(logits.argmax())]
    assert abs(result.logprobs[0].logprob - float(torch.log_softmax(logits, 0).max())) < 1e-4

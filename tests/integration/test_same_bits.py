"""In bfloat16 and int8 the native kernels give a token the same bits whichever workers compute it, in whatever order.

Whatever the schedule, the placement, the replicas, the batches: tokens and log-probabilities are, to the last bit,
those of one worker that runs all layers in one step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from amoe.config import BLOCK_SCHEDULES, EngineConfig, PlacementConfig, QuantizationName
from amoe.engine import model_loading
from amoe.kernels import native
from tests.cluster import InprocCluster
from tests.integration.exactness import BUILTIN, Case, checkpoint

pytestmark = pytest.mark.skipif(not native.is_available(), reason="the native kernels are not built")

THREE = PlacementConfig(expert_workers=3, redundant_experts=2)
QUANTIZATIONS: tuple[QuantizationName | None, ...] = (None, "int8")
Said = list[tuple[list[int], list[float]]]


def said(case: Case, config: EngineConfig) -> Said:
    """Tokens and log-probabilities of each prompt."""
    cluster = InprocCluster(config)
    results = cluster.generate(case.prompts, case.params)
    cluster.close()
    return [(result.token_ids, [entry.logprob for entry in result.logprobs]) for result in results]


@pytest.fixture(name="configure", scope="module")
def fixture_configure(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., EngineConfig]:
    root: Path = tmp_path_factory.mktemp("bits")

    def configure(case: Case, quantization: QuantizationName | None) -> EngineConfig:
        config = case.config(checkpoint(root, case.arch, case.variant))
        return replace(config, dtype="bfloat16", quantization=quantization)

    return configure


@pytest.fixture(name="undisturbed", scope="module")
def fixture_undisturbed(configure: Callable[..., EngineConfig]) -> Callable[..., Said]:
    @functools.cache
    def undisturbed(arch: str, quantization: QuantizationName | None) -> Said:
        case = Case("forward", 1, arch, "1", "plain", 0, kernels="native")
        return said(case, configure(case, quantization))

    return undisturbed


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize(
    ("arch", "schedule"),
    [
        pytest.param(arch, schedule, marks=[] if arch == "olmoe" or schedule == "waves" else pytest.mark.matrix)
        for arch in ("olmoe", "qwen2_moe", BUILTIN)
        for schedule in BLOCK_SCHEDULES
    ],
)
def test_any_schedule_and_placement(
    arch: str,
    schedule: str,
    quantization: QuantizationName | None,
    configure: Callable[..., EngineConfig],
    undisturbed: Callable[..., Said],
) -> None:
    count = {"waves": 0, "lockstep": 2}.get(schedule, 1)
    for placement, replicas in (("colocated2", 0), ("2A2E", 2), ("1A1E", 0)):
        case = Case(schedule, count, arch, placement, "preempted", 0, replicas=replicas, kernels="native")
        assert said(case, configure(case, quantization)) == undisturbed(arch, quantization), case


@pytest.mark.parametrize("kernels", [("native", "torch"), ("torch", "native")])
def test_workers_with_other_kernels_work_together(
    kernels: tuple[str, str], configure: Callable[..., EngineConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `auto` has it on processors of two kinds; their sums then come in the dtype of whoever computes them."""
    by_turns = iter(kernels)
    monkeypatch.setattr(model_loading, "uses_native", lambda *_: next(by_turns) == "native")
    case = Case("waves", 0, "olmoe", "1A1E", "plain", 0)
    told = said(case, configure(case, None))
    assert next(by_turns, None) is None, "each worker has asked once"
    assert [len(token_ids) for token_ids, _ in told] == [case.params.max_tokens] * len(case.prompts)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe"])
def test_three_holders(
    arch: str,
    quantization: QuantizationName | None,
    configure: Callable[..., EngineConfig],
    undisturbed: Callable[..., Said],
) -> None:
    case = Case("waves", 0, arch, "2A2E", "cached", 0, replicas=2, kernels="native")
    config = replace(configure(case, quantization), placement=THREE)
    assert said(case, config) == undisturbed(arch, quantization)

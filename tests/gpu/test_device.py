"""The engine on an accelerator: token-exact in float32, close in bfloat16, nothing left behind.

The reference runs on the CPU (`amoe.models.reference`), so no other package is needed here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from amoe.builtin import builtin_model_path
from amoe.config import CacheConfig, EngineConfig, PlacementConfig, SchedulerConfig
from amoe.engine.messages import HoldExperts, Holding
from amoe.engine.tokenizer import Tokenizer
from amoe.models.config import load_model_config
from amoe.models.loader import load_model
from amoe.models.model import Blocks, Model
from amoe.models.reference import forward, greedy
from amoe.types import SamplingParams
from tests.cluster import InprocCluster

pytestmark = pytest.mark.gpu
NUM_NEW = 16
PLACEMENTS = {
    "1": PlacementConfig(),
    "colocated2": PlacementConfig(colocated=2),
    "1A1E": PlacementConfig(expert_workers=1),
    "2A2E": PlacementConfig(attention_workers=2, expert_workers=2),
}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    text = Path(__file__).read_text()
    tokenizer = Tokenizer(builtin_model_path())
    return [tokenizer.encode(text[start : start + 40 + 23 * start % 211]) for start in range(0, 900, 130)]


@pytest.fixture(scope="module")
def reference_model() -> Model:
    path = builtin_model_path()
    config = load_model_config(path)
    return load_model(path, config, Blocks.whole(config), dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def expected(reference_model: Model, prompts: list[list[int]]) -> list[list[int]]:
    return [greedy(reference_model, prompt, NUM_NEW) for prompt in prompts]


def engine_config(device: str, placement: str = "1", dtype: str = "float32") -> EngineConfig:
    return EngineConfig(
        model=str(builtin_model_path()),
        dtype=dtype,  # type: ignore[arg-type]
        device=device,
        placement=PLACEMENTS[placement],
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64),
        cache=CacheConfig(num_blocks=200),
    )


def params() -> SamplingParams:
    return SamplingParams(max_tokens=NUM_NEW, temperature=0.0, ignore_eos=True, logprobs=1)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("schedule", ["progress", "defrag", "lockstep"])
def test_float32_is_token_exact(
    device: str, placement: str, schedule: str, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    config = engine_config(device, placement)
    config = replace(config, scheduler=replace(config.scheduler, schedule=schedule))
    cluster = InprocCluster(config)
    results = cluster.generate(prompts, params())
    assert [result.token_ids for result in results] == expected
    cluster.assert_nothing_left()
    cluster.close()


def test_bfloat16_is_close(device: str, prompts: list[list[int]], reference_model: Model) -> None:
    """The log-probability that bfloat16 gives to its own first token is close to what float32 gives to that token."""
    cluster = InprocCluster(engine_config(device, "colocated2", "bfloat16"))
    results = cluster.generate(prompts, params())
    cluster.close()
    for prompt, result in zip(prompts, results, strict=True):
        logprobs = torch.log_softmax(forward(reference_model, prompt)[-1], dim=-1)
        assert abs(float(logprobs[result.token_ids[0]]) - result.logprobs[0].logprob) < 0.15


def test_nothing_leaks(device: str, prompts: list[list[int]]) -> None:
    if device == "cpu":
        pytest.skip("the host's memory is everybody's")
    module = torch.get_device_module(device)
    cluster = InprocCluster(engine_config(device, "2A2E"))
    sizes = []
    for _ in range(4):
        cluster.generate(prompts, params())
        cluster.settle()
        module.synchronize()
        sizes.append(module.memory_allocated())
    assert sizes[1:] == sizes[1:2] * 3  # the first round fills caches
    cluster.close()


class HoldingCluster(InprocCluster):
    """An `InprocCluster` whose workers may be told to hold other experts."""

    def _collect(self, rank: int) -> None:
        control = self.controls[rank]
        self.held = self.held | {m.order for m in control.outbox if isinstance(m, Holding) and not m.complaint}
        control.outbox = [message for message in control.outbox if not isinstance(message, Holding)]
        super()._collect(rank)

    held: frozenset[int] = frozenset()


def test_weights_come_and_go_between_steps(device: str, prompts: list[list[int]], expected: list[list[int]]) -> None:
    """Two experts more of each layer, read beside the loop, and gone again, while all others compute."""
    cluster = HoldingCluster(engine_config(device, "2A2E"))
    store = cluster.workers[2]._experts
    before, num_bytes = store.held(), store.parameter_bytes
    layers = range(len(cluster.workers[2]._loading._sparse))
    usual = [list(before.get(layer, ())) for layer in layers]
    more = [sorted({*ids, 14, 15}) if ids else [] for ids in usual]
    for order in range(6):
        ids = [cluster.add(prompt, params()) for prompt in prompts]
        cluster.controls[2].inbox.append(HoldExperts(order, usual if order % 2 else more))
        while order not in cluster.held:
            cluster.turn()
        assert (store.parameter_bytes > num_bytes) == (order % 2 == 0)
        cluster.run()
        assert [cluster.requests[request_id].token_ids for request_id in ids] == expected
    assert (store.held(), store.parameter_bytes) == (before, num_bytes)
    cluster.assert_nothing_left()
    cluster.close()

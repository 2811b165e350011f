"""Emulated devices in the real engine: the right number of tokens, whatever the placement and the schedule."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from amoe.bench.offline import running_engine
from amoe.builtin import builtin_model_path
from amoe.config import CacheConfig, EngineConfig, PlacementConfig, ScheduleName, SchedulerConfig
from amoe.types import SamplingParams
from tests.cluster import InprocCluster

PLACEMENTS = (
    PlacementConfig(),
    PlacementConfig(colocated=4),
    PlacementConfig(attention_workers=2, expert_workers=3),
    PlacementConfig(attention_workers=2, expert_workers=3, redundant_experts=2),
)
# Modelled times of microseconds: what is tested is not the time.
FAST = "emulated:h100,slow=1e-6,sigma=1.25"


def config_of(
    device: str, placement: PlacementConfig, schedule: ScheduleName = "progress", **fields: int
) -> EngineConfig:
    return EngineConfig(
        model=str(builtin_model_path()),
        device=device,
        placement=placement,
        scheduler=SchedulerConfig(schedule=schedule, max_num_seqs=4, max_num_batched_tokens=16),
        cache=CacheConfig(block_size=4),
        **fields,
    )


@contextmanager
def cluster_of(config: EngineConfig) -> Iterator[InprocCluster]:
    cluster = InprocCluster(config)
    yield cluster
    cluster.assert_nothing_left()
    cluster.close()


@pytest.mark.parametrize("schedule", ["progress", "defrag", "lockstep"])
@pytest.mark.parametrize("placement", PLACEMENTS, ids=["one", "colocated", "apart", "replicas"])
def test_every_request_gets_its_tokens(placement: PlacementConfig, schedule: ScheduleName) -> None:
    with cluster_of(config_of(FAST, placement, schedule)) as cluster:
        asked = [SamplingParams(max_tokens=3 + i, prompt_logprobs=2 if i % 4 == 0 else None) for i in range(9)]
        ids = [cluster.add([7] * (1 + 5 * i), params) for i, params in enumerate(asked)]
        cluster.run()
        for index, request_id in enumerate(ids):
            request = cluster.requests[request_id]
            assert len(request.token_ids) == 3 + index
            assert len(request.prompt_logprobs) == (5 * index if index % 4 == 0 else 0)
            assert request.finish_reason == "length", "no end of sequence is made up"


def test_named_model_shapes_the_core_and_the_costs() -> None:
    device = "emulated:h200,slow=1e-6,model=deepseek-v3"
    with cluster_of(config_of(device, PlacementConfig(colocated=8), max_model_len=4096)) as cluster:
        (request,) = cluster.generate([list(range(3, 40))], SamplingParams(max_tokens=2, logprobs=1))
        assert len(request.token_ids) == len(request.logprobs) == 2
        stats = cluster.workers[0].stats.snapshot(cluster.workers[0].core, 0.0)
        assert len(stats.expert_pairs) == 61
        assert len(stats.expert_pairs[0]) == 256
        assert 0.0 < stats.modelled_s < stats.busy_s
        assert cluster.ready[0].max_model_len == 4096


async def test_real_processes() -> None:
    config = config_of(FAST, PlacementConfig(attention_workers=1, expert_workers=2))
    async with running_engine(config) as (engine, _):
        generations = engine.start([([5, 6, 7], SamplingParams(max_tokens=n)) for n in (1, 9)])
        counts = [sum([len(delta.token_ids) async for delta in generation]) for generation in generations]
    assert counts == [1, 9]


@pytest.mark.parametrize("command", [["serve", "--port", "0"], ["bench", "offline"]], ids=["serve", "bench"])
def test_unknown_profile_is_told_before_anything_starts(command: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "amoe.cli", *command, "--device", "emulated:z9"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "there is no device profile 'z9'; known: a100-80g, h100" in done.stderr
    assert "Traceback" not in done.stderr

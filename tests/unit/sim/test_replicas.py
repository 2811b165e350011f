"""Replicas and their shares in simulations."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from amoe.config import PlacementConfig, SchedulerConfig
from amoe.errors import ConfigError
from amoe.policy.placement import place_experts
from amoe.profiles.routing import log_normal_routing
from amoe.sim.config import Slowdown
from amoe.sim.memory import weight_bytes
from amoe.sim.replicas import read_loads, with_replicas
from amoe.sim.simulator import Simulator
from amoe.sim.workload import Lengths, Workload
from tests.unit.sim.cases import SIZES, FixedRouting, make_config

HOT = np.where(np.isin(np.arange(SIZES.num_experts), (0, 1)), 1.0, 1e-3) * np.ones((SIZES.num_layers, 1))
CONFIG = make_config(
    routing=FixedRouting(0, 1),
    placement=PlacementConfig(attention_workers=2, expert_workers=2),
    workload=Workload(concurrency=64, num_requests=64, input=Lengths(mean=2), output=Lengths(mean=20)),
    scheduler=SchedulerConfig(max_num_seqs=32),
)


def expert_rows(config) -> list[float]:
    """Tokens that each expert worker has run, relative to all."""
    blocks = [worker.blocks.get("experts") for worker in Simulator(config).run().workers[2:]]
    rows = [block.steps * block.mean_batch if block else 0.0 for block in blocks]
    return [count / sum(rows) for count in rows]


def test_shares_decide_which_replica_computes():
    owners = np.concatenate((place_experts(SIZES.num_layers, SIZES.num_experts, 2),) * 2, axis=-1)
    owners[..., 1] = np.where(np.isin(np.arange(SIZES.num_experts), (0, 1)), 1, -1)
    assert expert_rows(CONFIG) == [1.0, 0.0]
    for first, rows in ((1.0, [1.0, 0.0]), (0.0, [0.0, 1.0]), (0.25, [0.25, 0.75])):
        shares = np.where(owners[..., 1:] >= 0, [first, 1 - first], [1.0, 0.0])
        # A token whose two experts are at different workers is a row at both.
        assert expert_rows(replace(CONFIG, owners=owners, shares=shares)) == pytest.approx(rows, abs=0.04)


def test_even_shares_wake_all_replicas():
    config = with_replicas(CONFIG, 2, HOT, "even")
    assert config.owners is not None and config.shares is not None
    assert ((config.shares > 0) == (config.owners >= 0)).all()
    assert (with_replicas(CONFIG, 2, HOT, "primary").shares[..., 0] == 1.0).all()


def test_planned_shares_level_workers_of_different_speed():
    config = replace(
        CONFIG,
        workload=replace(CONFIG.workload, concurrency=4096, num_requests=4096),
        slowdowns=(Slowdown(rank=3, factor=3.0),),
    )
    planned = with_replicas(config, 2, HOT, "planned")
    assert planned.shares is not None and planned.owners is not None
    slow = np.where(planned.owners[:, :2] == 1, planned.shares[:, :2], 0.0).sum(axis=-1)
    assert slow.sum(axis=1) == pytest.approx(2 / 4, abs=0.1)  # a quarter of all pairs: two experts of equal load


def test_replicas_take_memory():
    config = with_replicas(CONFIG, 2, HOT, "even")
    assert weight_bytes(config, 2) == pytest.approx(6 / 4 * weight_bytes(CONFIG, 2))


def test_nobody_plans_for_batches_of_unknown_size():
    config = replace(CONFIG, workload=Workload(request_rate=1.0, num_requests=2))
    with pytest.raises(ConfigError, match="closed loop only"):
        with_replicas(config, 1, HOT, "planned")


def test_what_does_not_belong_together_is_refused():
    with pytest.raises(ConfigError, match="needs their owners"):
        replace(CONFIG, placement=PlacementConfig(colocated=2, redundant_experts=1))
    with pytest.raises(ConfigError, match="shares need owners"):
        replace(CONFIG, shares=np.ones((3, 8, 1)))


def test_loads_of_a_file(tmp_path):
    path = tmp_path / "load.json"
    loads = log_normal_routing(SIZES, 1.0, seed=0).popularity()
    path.write_text(json.dumps([[0.0] * 8, *loads[1:].tolist()]))
    read = read_loads(path, SIZES)
    assert (read[1:] == loads[1:]).all()
    assert (read[0] == 1.0).all()
    for content in ("[[1, 2]]", "nonsense", "[[1], [2, 3]]", '{"a": 1}', json.dumps((-loads).tolist())):
        path.write_text(content)
        with pytest.raises(ConfigError, match="must hold 3 lists, one per layer, of 8 numbers"):
            read_loads(path, SIZES)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_loads(tmp_path / "none", SIZES)

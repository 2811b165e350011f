"""Where experts live: from flags and a file of loads, the same at every process; and what a worker then loads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from amoe.builtin import builtin_model_path
from amoe.cluster.local import LocalCluster
from amoe.config import EngineConfig, PlacementConfig
from amoe.engine.expert_placement import expert_owners, placement_digest, read_expert_load, write_expert_load
from amoe.engine.messages import Ready
from amoe.errors import ConfigError
from amoe.models.config import load_model_config
from amoe.models.loader import Blocks, load_model
from amoe.policy.placement import experts_of, place_experts
from tests.checkpoints import make_checkpoint


def config_of(model: Path, **placement: object) -> EngineConfig:
    return EngineConfig(model=str(model), placement=PlacementConfig(**placement))  # type: ignore[arg-type]


def test_without_replicas_it_is_the_plain_placement() -> None:
    model = load_model_config(builtin_model_path())
    owners = expert_owners(config_of(builtin_model_path(), colocated=2), model)
    assert (owners == place_experts(model.num_layers, model.num_experts, 2)).all()


def test_replicas_are_of_the_experts_that_the_file_calls_hot(tmp_path: Path) -> None:
    model = load_model_config(builtin_model_path())
    load = np.ones((model.num_layers, model.num_experts))
    load[:, 3] = 100.0
    write_expert_load(tmp_path / "load.json", load)
    assert (read_expert_load(str(tmp_path / "load.json"), *load.shape) == load).all()
    placement = {"colocated": 2, "redundant_experts": 1, "expert_load": str(tmp_path / "load.json")}
    owners = expert_owners(config_of(builtin_model_path(), **placement), model)
    assert (owners[:, 3] == [0, 1]).all()
    blind = expert_owners(config_of(builtin_model_path(), colocated=2, redundant_experts=1), model)
    assert placement_digest(owners) != placement_digest(blind)
    assert placement_digest(owners) == placement_digest(owners.copy())


def test_no_worker_holds_more_than_all_experts() -> None:
    model = load_model_config(builtin_model_path())
    rest = model.num_experts - model.num_experts // 3
    owners = expert_owners(config_of(builtin_model_path(), expert_workers=3, redundant_experts=rest), model)
    assert ((owners >= 0).sum(axis=-1) == 3).all()
    with pytest.raises(
        ConfigError, match=f"--redundant-experts {rest + 1} .* holds 5 anyway, and can hold {rest} more"
    ):
        expert_owners(config_of(builtin_model_path(), expert_workers=3, redundant_experts=rest + 1), model)
    later = {"expert_workers": 2, "max_expert_workers": 3, "redundant_experts": rest}
    assert ((expert_owners(config_of(builtin_model_path(), **later), model) >= 0).sum(axis=-1) == 2).all()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[[1, 2], [3]]", "2 lists"),
        ("[[1, 2, 3], [4, 5, 6]]", "of 2 numbers"),
        ('[["a", "b"], [1, 2]]', "of 2 numbers"),
        ('{"pairs": 1}', "of 2 numbers"),
        ("[[1, 2], [3, -4]]", "at least 0"),
        ("[[1, 2], [3, Infinity]]", "finite"),
    ],
)
def test_wrong_files_are_told(content: str | None, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "load.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=reason) as caught:
        read_expert_load(str(path), 2, 2)
    assert "--expert-load" in str(caught.value)


def test_layers_without_a_measurement_count_as_uniform(tmp_path: Path) -> None:
    path = tmp_path / "load.json"
    path.write_text(json.dumps([[0, 0], [1, 3]]))
    assert read_expert_load(str(path), 2, 2).tolist() == [[1, 1], [1, 3]]


def test_workers_that_disagree_are_not_served() -> None:
    cluster = LocalCluster(config_of(builtin_model_path(), colocated=2))
    cluster.owners = place_experts(2, 4, 2)
    same = Ready(8, 1, 1, 0, placement_digest(cluster.owners))
    cluster._check_placement([same, same])
    with pytest.raises(ConfigError, match="--expert-load has changed"):
        cluster._check_placement([same, Ready(8, 1, 1, 0, placement_digest(place_experts(2, 4, 1)))])


def test_a_worker_loads_the_weights_of_its_replicas(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "m", "olmoe", seed=1)
    model = load_model_config(path)
    owners = expert_owners(config_of(path, colocated=2, redundant_experts=2), model)
    load = {"dtype": torch.float32, "device": "cpu"}
    whole = load_model(path, model, Blocks.whole(model), **load).weights.experts  # type: ignore[arg-type]
    num_held = 0
    for owner in range(2):
        held = experts_of(owners, owner, model.sparse_layers)
        experts = load_model(path, model, Blocks(False, held), **load).weights.experts  # type: ignore[arg-type]
        for layer, ids in held.items():
            assert experts[layer].ids == ids
            assert torch.equal(experts[layer].w13, whole[layer].w13[list(ids)])
            assert torch.equal(experts[layer].w2, whole[layer].w2[list(ids)])
            num_held += len(ids)
    assert num_held == (owners >= 0).sum() > model.num_layers * model.num_experts

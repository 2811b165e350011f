"""`benchmarks/make_checkpoint.py`: what it writes loads, streams as text, and has the skew it says."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from amoe.engine.tokenizer import Tokenizer
from amoe.models.config import load_model_config
from amoe.models.loader import check_checkpoint
from benchmarks.make_checkpoint import Shape, fit_biases, make_checkpoint, popularity

TINY = Shape(
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_experts=6,
    top_k=2,
    intermediate_size=16,
    vocab_size=4500,
    max_position=64,
)


def tensors_of(directory):
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    tensors = {}
    for file in sorted(set(index["weight_map"].values())):
        tensors.update(load_file(directory / file))
    assert set(tensors) == set(index["weight_map"])
    return tensors


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("made")
    total = make_checkpoint(path, TINY, seed=1, router_skew=1.0)
    assert total == sum(t.numel() for t in tensors_of(path).values())
    return path


def test_the_checkpoint_loads(directory):
    config = load_model_config(directory)
    assert (config.num_experts, config.top_k, config.vocab_size) == (6, 2, 4500)
    assert check_checkpoint(directory, config) == 2 * sum(t.numel() for t in tensors_of(directory).values())


def test_every_id_is_text(directory):
    tokenizer = Tokenizer(directory)
    assert tokenizer.vocab_size == 4500
    assert tokenizer.decode([4499, 4100]) == " t4499 t4100"
    assert max(tokenizer.encode("def add(a, b): return t4499 t4100")) < 4096


def test_nothing_but_the_router_sees_the_constant(directory):
    for name, tensor in tensors_of(directory).items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            assert (tensor[0] == 0).all()
        elif name == "model.embed_tokens.weight":
            assert (tensor[:, 0] == 1).all()
        elif name.endswith("mlp.gate.weight"):
            assert tensor[:, 0].std() > 0.1
        elif tensor.dim() == 2:
            assert (tensor[:, 0] == 0).all()


def test_the_seed_decides_everything(directory, tmp_path):
    make_checkpoint(tmp_path / "same", TINY, seed=1, router_skew=1.0)
    make_checkpoint(tmp_path / "other", TINY, seed=2)
    same, other, made = tensors_of(tmp_path / "same"), tensors_of(tmp_path / "other"), tensors_of(directory)
    assert all(torch.equal(tensor, same[name]) for name, tensor in made.items())
    assert not torch.equal(made["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize(("num_experts", "top_k", "skew"), [(32, 4, 0.5), (32, 4, 1.5), (8, 2, 3.0), (4, 4, 1.0)])
def test_popularity_is_what_top_k_can_give(num_experts, top_k, skew):
    wanted = popularity(np.random.default_rng(0), num_experts, top_k, skew)
    assert wanted.sum() == pytest.approx(top_k, rel=1e-3)
    assert 0 < wanted.min() <= wanted.max() <= 1


def test_biases_give_the_popularity():
    rng = np.random.default_rng(0)
    wanted = popularity(rng, 16, 2, 1.0)
    logits = rng.standard_normal((20_000, 16)) + fit_biases(rng, wanted)
    chosen = np.argsort(logits, axis=1)[:, -2:]
    measured = np.bincount(chosen.ravel(), minlength=16) / len(logits)
    np.testing.assert_allclose(measured, wanted, atol=0.03)


@pytest.mark.parametrize("wrong", [{"num_heads": 3}, {"top_k": 7}, {"vocab_size": 1000}])
def test_impossible_shapes_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match="--"):
        make_checkpoint(tmp_path, replace(TINY, **wrong))

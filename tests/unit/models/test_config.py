"""`config.json` in the spellings that are in use, against transformers' own reading where it has one."""

from __future__ import annotations

import json

import pytest
import torch

from amoe.models import reference
from amoe.models.config import RopeConfig, load_model_config
from amoe.models.layers import rope_frequencies, rope_table
from amoe.models.loader import Blocks, load_model
from tests.checkpoints import ARCHES, hf_logits, hf_model

ROPES = [
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    {
        "rope_type": "yarn",
        "rope_theta": 1000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 8,
        "beta_slow": 2,
        "truncate": False,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    },
    {
        "rope_type": "yarn",
        "rope_theta": 1000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 0.7,
    },
]


def whole(path):
    config = load_model_config(path)
    return load_model(path, config, Blocks.whole(config), dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_rope_types_equal_transformers(checkpoint_factory, rope):
    path = checkpoint_factory("qwen3_moe", 0, rope_parameters=rope)
    config = load_model_config(path)
    rotary = hf_model(path).model.rotary_emb
    torch.testing.assert_close(rope_frequencies(config.rope, config.head_dim), rotary.inv_freq, rtol=1e-6, atol=0)
    assert config.rope.attention_factor == pytest.approx(rotary.attention_scaling)
    ids = [(7 * i + i * i) % 101 for i in range(100)]
    with torch.inference_mode():
        assert (reference.forward(whole(path), ids) - hf_logits(path, ids)).abs().max() < 1e-4
        cos, sin = rotary(torch.zeros(1), torch.arange(256)[None])
    table = rope_table(config, config.max_position_embeddings, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(table[:, 0], cos[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(table[:, 1].abs(), sin[0].abs(), atol=1e-5, rtol=0)


def rewrite(source, target, edit):
    config = json.loads((source / "config.json").read_text())
    edit(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("rope", ROPES[:4], ids=lambda rope: rope["rope_type"])
def test_rope_in_the_spelling_before_transformers_5(checkpoint_factory, tmp_path, rope):
    source = checkpoint_factory("qwen3_moe", 0, rope_parameters=rope)

    def edit(config):
        parameters = config.pop("rope_parameters")
        config["rope_theta"] = parameters.pop("rope_theta")
        parameters["type"] = parameters.pop("rope_type")
        config["rope_scaling"] = None if parameters["type"] == "default" else parameters
        config["torch_dtype"] = config.pop("dtype")
        config["num_experts"] = config.pop("num_local_experts")

    assert load_model_config(rewrite(source, tmp_path, edit)) == load_model_config(source)


@pytest.mark.parametrize("arch", ARCHES)
def test_an_absent_option_is_transformers_default(checkpoint_factory, tmp_path, arch):
    """Options with a default may be missing; then the answer must be that of transformers' class."""
    source = checkpoint_factory(arch, 0)
    optional = ["rms_norm_eps", "rope_parameters", "norm_topk_prob", "tie_word_embeddings", "eos_token_id", "dtype"]
    optional += ["max_position_embeddings", "qkv_bias", "decoder_sparse_step", "mlp_only_layers", "hidden_act"]
    rewrite(source, tmp_path, lambda config: [config.pop(name, None) for name in optional])
    (tmp_path / "generation_config.json").write_text("{}")
    ours = load_model_config(tmp_path)
    import transformers

    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope == RopeConfig(theta=theirs.rope_parameters["rope_theta"])
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.norm_topk_prob == getattr(theirs, "norm_topk_prob", True)
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.qkv_bias == getattr(theirs, "qkv_bias", False)
    assert ours.eos_token_ids == ((2,) if arch == "mixtral" else ())  # OLMoE's 50279 is outside this vocabulary


def test_end_of_sequence_ids_of_both_files(checkpoint_factory, tmp_path):
    source = checkpoint_factory("olmoe", 0)
    rewrite(source, tmp_path, lambda config: config.update(eos_token_id=[7, 3]))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 3, 500]}')
    assert load_model_config(tmp_path).eos_token_ids == (3, 5, 7)


def test_sparse_and_dense_layers(checkpoint_factory, tmp_path):
    source = checkpoint_factory("qwen3_moe", 0)
    edit = {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    config = load_model_config(rewrite(source, tmp_path, lambda config: config.update(edit)))
    assert config.sparse_layers == (False, True, False, False, False, True)
    assert set(Blocks.whole(config).experts) == {1, 5}


def test_head_dim_is_derived_where_it_is_absent(checkpoint_factory):
    assert load_model_config(checkpoint_factory("qwen2_moe", 0)).head_dim == 16

"""Sizes of models against what their authors publish."""

from __future__ import annotations

from dataclasses import replace

import pytest

from amoe.errors import ConfigError
from amoe.profiles.models import MODELS, ModelSizes, model_sizes

# Billions of parameters: all, and active per token where the authors say so.
PUBLISHED = {
    "mixtral-8x7b": (46.7, 12.9),
    "qwen3-30b-a3b": (30.5, 3.3),
    "olmoe-1b-7b": (6.9, 1.3),
    "deepseek-v3": (671.0, 37.0),
    "gpt-oss-120b": (116.8, 5.1),
}


def total_params(sizes: ModelSizes) -> float:
    experts = sizes.expert_bytes / sizes.expert_weight_bytes * sizes.num_experts * sizes.num_sparse_layers
    return sizes.attention_bytes / sizes.weight_bytes + experts


def active_params(sizes: ModelSizes) -> float:
    inactive = (sizes.num_experts - sizes.top_k) * sizes.expert_params * sizes.num_sparse_layers
    return total_params(sizes) - inactive


@pytest.mark.parametrize("name", PUBLISHED)
def test_total_parameters_are_the_published_ones(name):
    assert total_params(MODELS[name]) / 1e9 == pytest.approx(PUBLISHED[name][0], rel=0.005)


@pytest.mark.parametrize("name", PUBLISHED)
def test_active_parameters_are_the_published_ones(name):
    """Authors count embedding and head in (DeepSeek, OLMoE) or partly out (gpt-oss, Qwen), so this is coarser."""
    sizes = MODELS[name]
    embedding = sizes.vocab_size * sizes.hidden_size
    published = PUBLISHED[name][1] * 1e9
    assert published == pytest.approx(active_params(sizes), rel=0.03) or published == pytest.approx(
        active_params(sizes) - embedding, rel=0.03
    )


@pytest.mark.parametrize(
    ("name", "bytes_per_token"),
    [
        ("mixtral-8x7b", 32 * 2 * 8 * 128 * 2),
        ("mixtral-8x7b-mqa-top1", 32 * 2 * 128 * 2),
        ("deepseek-v3", 61 * (512 + 64) * 2),
        ("gpt-oss-120b", 36 * 2 * 8 * 64 * 2),
    ],
)
def test_kv_cache_of_a_token(name, bytes_per_token):
    assert MODELS[name].num_layers * MODELS[name].kv_bytes == bytes_per_token


def test_attention_works_on_keys_and_values_of_every_head():
    assert MODELS["qwen3-30b-a3b"].attention_flops == 2 * 2 * 32 * 128  # scores and mix, multiply and add
    assert MODELS["deepseek-v3"].attention_flops == 2 * 128 * ((512 + 64) + 512)


def test_dense_layers_come_first_and_have_no_experts():
    sizes = MODELS["deepseek-v3"]
    assert sizes.sparse_layers == (False,) * 3 + (True,) * 58
    assert sizes.block_params(0) - sizes.attention_params == 3 * 7168 * 18432
    assert sizes.block_params(3) - sizes.attention_params == 7168 * 256 + 3 * 7168 * 2048


def test_bytes_follow_the_format_of_the_weights():
    assert MODELS["gpt-oss-120b"].expert_bytes == 3 * 2880 * 2880 * (4 + 8 / 32) / 8
    assert MODELS["mixtral-8x7b"].row_bytes == 4096 * 2


@pytest.mark.parametrize(
    "change", [{"top_k": 0}, {"top_k": 9}, {"num_dense_layers": 32}, {"num_dense_layers": -1}], ids=str
)
def test_sizes_that_cannot_be_are_refused(change):
    with pytest.raises(ConfigError, match="mixtral"):
        replace(MODELS["mixtral-8x7b"], **change)


def test_an_unknown_model_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="'gpt-5'; known: mixtral-8x7b"):
        model_sizes("gpt-5")
    assert model_sizes("olmoe-1b-7b").num_experts == 64

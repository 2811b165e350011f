"""A checkpoint that cannot be served is refused with one line that names the thing."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from amoe.errors import CheckpointError
from amoe.models.config import load_model_config
from amoe.models.loader import Blocks, check_checkpoint, load_model, resolve_dtype


@pytest.fixture
def copy(checkpoint_factory, tmp_path):
    """copy(arch, edit of config.json, **options): a private copy of a checkpoint."""

    def make(arch, edit=None, **options):
        source = checkpoint_factory(arch, 0, **options)
        for file in source.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = json.loads((tmp_path / "config.json").read_text())
        for name, value in (edit or {}).items():
            config[name] = value
            if value is KeyError:
                del config[name]
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return make


def refusal(call, *args, **kwargs):
    with pytest.raises(CheckpointError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def load(path, blocks=None):
    config = load_model_config(path)
    return load_model(path, config, blocks or Blocks.whole(config), dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(
    ("arch", "edit", "named"),
    [
        ("mixtral", {"architectures": ["LlamaForCausalLM"]}, ["LlamaForCausalLM", "MixtralForCausalLM"]),
        ("mixtral", {"architectures": []}, ["architectures"]),
        ("mixtral", {"architectures": KeyError}, ["architectures"]),
        ("mixtral", {"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ("mixtral", {"sliding_window": 128}, ["sliding_window", "128"]),
        ("mixtral", {"attention_bias": True}, ["attention_bias"]),
        ("olmoe", {"attention_bias": True}, ["attention_bias"]),
        ("qwen3_moe", {"attention_bias": True}, ["attention_bias"]),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 64}, ["sliding_window", "64"]),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 64}, ["sliding_window", "64"]),
        ("qwen2_moe", {"layer_types": ["full_attention", "sliding_attention"]}, ["sliding_window", "0"]),
        ("qwen3_moe", {"layer_types": ["linear_attention", "full_attention"]}, ["linear_attention"]),
        ("olmoe", {"quantization_config": {"quant_method": "fp8"}}, ["quantization_config", "fp8"]),
        ("olmoe", {"dtype": "float8_e4m3fn"}, ["dtype", "float8_e4m3fn"]),
        ("olmoe", {"dtype": KeyError, "torch_dtype": "int8"}, ["torch_dtype", "int8"]),
        ("olmoe", {"hidden_size": KeyError}, ["hidden_size"]),
        ("olmoe", {"hidden_size": "48"}, ["hidden_size", "'48'"]),
        ("olmoe", {"num_hidden_layers": 0}, ["num_hidden_layers"]),
        ("olmoe", {"num_hidden_layers": True}, ["num_hidden_layers"]),
        ("olmoe", {"rms_norm_eps": float("inf")}, ["rms_norm_eps"]),
        ("olmoe", {"norm_topk_prob": 1}, ["norm_topk_prob"]),
        ("olmoe", {"clip_qkv": -1.0}, ["clip_qkv"]),
        ("olmoe", {"num_experts_per_tok": 8}, ["num_experts_per_tok", "8"]),
        ("olmoe", {"num_experts": KeyError}, ["num_experts"]),
        ("olmoe", {"num_key_value_heads": 2}, ["num_key_value_heads"]),
        ("olmoe", {"head_dim": 15}, ["head_dim"]),
        ("olmoe", {"eos_token_id": "</s>"}, ["eos_token_id"]),
        ("qwen3_moe", {"mlp_only_layers": [2]}, ["mlp_only_layers"]),
        ("qwen3_moe", {"decoder_sparse_step": 0}, ["decoder_sparse_step"]),
        ("qwen2_moe", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ("mixtral", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, ["rope_parameters", "dynamic"]),
        ("mixtral", {"rope_parameters": None, "rope_scaling": {"type": "longrope"}}, ["rope_scaling", "longrope"]),
        ("mixtral", {"rope_parameters": {"rope_type": "linear"}}, ["rope_parameters", "factor"]),
        ("mixtral", {"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, ["mrope_section"]),
        ("mixtral", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["full_attention"]),
        ("mixtral", {"rope_parameters": ["default"]}, ["rope_parameters"]),
        ("mixtral", {"rope_parameters": {"rope_theta": -1}}, ["rope_theta"]),
    ],
)
def test_options(copy, arch, edit, named):
    message = refusal(load_model_config, copy(arch, edit))
    assert "config.json" in message
    for word in named:
        assert word in message


def test_harmless_values_of_those_options_are_accepted(copy):
    edit = {"sliding_window": 4096, "quantization_config": None, "attention_bias": False, "rope_scaling": None}
    assert load_model_config(copy("mixtral", edit)).max_position_embeddings == 256


@pytest.mark.parametrize(
    ("content", "named"), [(None, "missing"), ("{", "JSON"), ("[1]", "list"), ("\xff", "JSON"), ("[" * 99999, "JSON")]
)
def test_config_that_is_no_object(tmp_path, content, named):
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="latin-1")
    message = refusal(load_model_config, tmp_path)
    assert "config.json" in message
    assert named in message


def test_directory_that_is_none(tmp_path):
    assert "nowhere" in refusal(load_model_config, tmp_path / "nowhere")


def test_generation_config_that_is_broken(copy):
    path = copy("olmoe")
    (path / "generation_config.json").write_text("nope")
    assert "generation_config.json" in refusal(load_model_config, path)


def edit_tensors(path, edit):
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors")


def test_missing_tensor(copy):
    path, name = copy("olmoe"), "model.layers.1.mlp.experts.3.up_proj.weight"
    edit_tensors(path, lambda tensors: tensors.pop(name))
    assert name in refusal(load, path)
    assert name in refusal(check_checkpoint, path, load_model_config(path))
    load(path, Blocks(True, {0: (3,)}))  # a worker that does not hold it can still start


def test_wrong_shape(copy):
    path, name = copy("qwen2_moe"), "model.layers.0.self_attn.k_proj.weight"
    edit_tensors(path, lambda tensors: tensors.update({name: torch.zeros(17, 48)}))
    message = refusal(load, path)
    for word in (name, "[17, 48]", "[16, 48]"):
        assert word in message


def test_wrong_shape_of_fused_experts(copy):
    path, name = copy("mixtral", fused=True), "model.layers.0.mlp.experts.gate_up_proj"
    edit_tensors(path, lambda tensors: tensors.update({name: tensors[name].transpose(1, 2).contiguous()}))
    message = refusal(load, path)
    for word in (name, "[7, 48, 72]", "[7, 72, 48]"):
        assert word in message


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_unsupported_dtype_of_a_tensor(copy, dtype):
    path, name = copy("olmoe"), "model.layers.0.self_attn.o_proj.weight"
    edit_tensors(path, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    message = refusal(load, path)
    assert name in message
    assert "F8_E4M3" in message or "I8" in message


def test_float16_needs_a_choice(copy):
    config = load_model_config(copy("olmoe", {"dtype": "float16"}))
    assert "float16" in refusal(resolve_dtype, "auto", config)


@pytest.mark.parametrize("keep", [0, 5, 5000, -1])
def test_truncated_file(copy, keep):
    file = copy("olmoe") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "model.safetensors: damaged" in refusal(load, file.parent)


def test_no_weights(copy):
    path = copy("olmoe")
    (path / "model.safetensors").unlink()
    assert "no *.safetensors" in refusal(load, path)


@pytest.mark.parametrize("damage", ["remove", "truncate", "lie", "escape", "empty"])
def test_sharded(copy, damage):
    path = copy("olmoe", shards=True)
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = "model.norm.weight"
    file = path / content["weight_map"][name]
    named = file.name
    if damage == "remove":
        file.unlink()
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "lie":
        other = next(f for f in content["weight_map"].values() if f != file.name)
        content["weight_map"][name] = other
        named = name
    elif damage == "escape":
        content["weight_map"][name] = named = "../elsewhere.safetensors"
    else:
        content, named = {}, "weight_map"
    index.write_text(json.dumps(content))
    assert named in refusal(load, path)


def test_the_same_tensor_in_two_files_without_an_index(copy):
    path = copy("olmoe")
    file = path / "model.safetensors"
    (path / "b.safetensors").write_bytes(file.read_bytes())
    file.rename(path / "a.safetensors")
    message = refusal(load, path)
    assert "a.safetensors" in message
    assert "b.safetensors" in message

"""What is read from a checkpoint: every layout, only the worker's own tensors, and whether they end up in place."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from amoe.errors import CheckpointError
from amoe.models import reference
from amoe.models.checkpoint import Checkpoint
from amoe.models.config import load_model_config
from amoe.models.loader import Blocks, check_checkpoint, load_experts, load_model, resolve_dtype
from tests.checkpoints import ARCHES, make_checkpoint

IDS = [4, 90, 33, 33, 7, 61]


def load(path, blocks=None, **options):
    config = load_model_config(path)
    settings = {"dtype": torch.float32, "device": "cpu"} | options
    return load_model(path, config, blocks or Blocks.whole(config), **settings)


def all_tensors(weights):
    """Every tensor of `Weights`, in a fixed order."""
    found = []

    def visit(value):
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)
        elif isinstance(value, dict):
            for key in sorted(value):
                visit(value[key])
        elif hasattr(value, "__slots__"):
            for name in value.__slots__:
                visit(getattr(value, name))

    visit(weights)
    return found


@pytest.mark.parametrize("arch", ARCHES)
def test_every_layout_gives_the_same_weights(checkpoint_factory, arch):
    plain = all_tensors(load(checkpoint_factory(arch, 0)).weights)
    for options in ({"fused": True}, {"shards": True}):
        path = checkpoint_factory(arch, 0, **options)
        assert len(list(path.glob("*.safetensors"))) > 1 or "shards" not in options
        other = all_tensors(load(path).weights)
        assert len(plain) == len(other)
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True)), options


def test_several_files_without_an_index(checkpoint_factory, tmp_path):
    source = checkpoint_factory("olmoe", 0, shards=True)
    for file in source.iterdir():
        if not file.name.endswith("index.json"):
            (tmp_path / file.name).symlink_to(file)
    ours, expected = (all_tensors(load(path).weights) for path in (tmp_path, source))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


class Spy:
    """Counts what is read from checkpoints: names, and elements."""

    def __init__(self, monkeypatch):
        self.names, self.elements, real = [], 0, Checkpoint.read

        def read(checkpoint, name, row=None):
            tensor = real(checkpoint, name, row)
            self.names.append(name)
            self.elements += tensor.numel()
            return tensor

        monkeypatch.setattr(Checkpoint, "read", read)


@pytest.mark.parametrize("fused", [False, True])
def test_an_expert_worker_reads_only_its_experts(checkpoint_factory, monkeypatch, fused):
    path, spy = checkpoint_factory("qwen3_moe", 0, fused=fused), Spy(monkeypatch)
    model = load(path, Blocks(False, {1: (2, 5)}))
    if fused:
        assert set(spy.names) == {"model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"}
    else:
        assert all(
            name.startswith(("model.layers.1.mlp.experts.2.", "model.layers.1.mlp.experts.5.")) for name in spy.names
        )
        assert len(spy.names) == len(set(spy.names)) == 6
    assert spy.elements == 2 * 3 * 48 * 36
    assert model.parameter_bytes == 4 * spy.elements
    assert model.held_experts == {1: (2, 5)}
    whole = load(path).weights.experts[1]
    assert torch.equal(model.weights.experts[1].w13, whole.w13[[2, 5]])
    assert torch.equal(model.weights.experts[1].w2, whole.w2[[2, 5]])


@pytest.mark.parametrize("arch", ARCHES)
def test_an_attention_worker_reads_no_routed_expert(checkpoint_factory, monkeypatch, arch):
    spy = Spy(monkeypatch)
    load(checkpoint_factory(arch, 0), Blocks(True, {}))
    assert spy.names
    assert not any(".experts." in name for name in spy.names)


@pytest.mark.parametrize("arch", ARCHES)
def test_progress_counts_every_byte_once(checkpoint_factory, arch):
    path, calls = checkpoint_factory(arch, 0), []
    model = load(path, on_progress=lambda done, total: calls.append((done, total)))
    file_bytes = sum(tensor.nbytes for tensor in load_file(path / "model.safetensors").values())
    assert calls[-1] == (file_bytes, file_bytes)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert model.parameter_bytes == file_bytes == check_checkpoint(path, model.config)


def test_tied_embeddings_are_one_tensor(checkpoint_factory):
    model = load(checkpoint_factory("mixtral", 0, tie_word_embeddings=True))
    assert model.weights.head.lm_head is model.weights.head.embedding
    separate = load(checkpoint_factory("mixtral", 0))
    assert separate.parameter_bytes - model.parameter_bytes == 4 * 101 * 48


def test_dtypes(checkpoint_factory):
    path = checkpoint_factory("olmoe", 0, dtype=torch.bfloat16)
    config = load_model_config(path)
    assert resolve_dtype("auto", config) == torch.bfloat16
    assert resolve_dtype("float32", config) == torch.float32
    wide, narrow = load(path), load(path, dtype=torch.bfloat16)
    assert wide.parameter_bytes == 2 * narrow.parameter_bytes
    for a, b in zip(all_tensors(wide.weights), all_tensors(narrow.weights), strict=True):
        assert torch.equal(a, b.float())
    assert reference.forward(narrow, IDS).dtype == torch.float32


def test_float16_is_read_into_float32(tmp_path):
    path = make_checkpoint(tmp_path, "olmoe", dtype=torch.float16)
    config = load_model_config(path)
    assert resolve_dtype("bfloat16", config) == torch.bfloat16
    expected = load_file(path / "model.safetensors")["lm_head.weight"].float()
    assert torch.equal(load(path).weights.head.lm_head, expected)


def test_weights_do_not_keep_the_file(checkpoint_factory, tmp_path):
    """A file that is replaced under a running server must not change its answers."""
    source = checkpoint_factory("qwen2_moe", 0)
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = load(tmp_path)
    before = reference.forward(model, IDS)
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as stream:
        stream.seek(-4096, 2)
        stream.write(b"\x7f" * 4096)
    assert torch.equal(reference.forward(model, IDS), before)


def test_unknown_tensors_are_left_alone(checkpoint_factory, tmp_path):
    source = checkpoint_factory("olmoe", 0)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["OlmoeForCausalLM"]
    assert torch.equal(reference.forward(load(tmp_path), IDS), reference.forward(load(source), IDS))


@pytest.mark.parametrize("fused", [False, True])
def test_experts_that_come_later_are_read_and_the_others_copied(checkpoint_factory, monkeypatch, fused):
    path = checkpoint_factory("qwen3_moe", 0, fused=fused)
    whole, spy = load(path).weights.experts[1], Spy(monkeypatch)
    config = load_model_config(path)
    options = {"dtype": torch.float32, "device": "cpu"}
    held = load_experts(path, config, 1, (0, 5), **options)
    assert torch.equal(held.w13, whole.w13[[0, 5]])
    held.w13[1] += 1.0  # to see where it comes from
    spy.elements = 0
    more = load_experts(path, config, 1, (2, 5, 6), held=held, **options)
    assert spy.elements == 2 * 3 * 48 * 36
    assert more.ids == (2, 5, 6)
    assert torch.equal(more.w13[[0, 2]], whole.w13[[2, 6]])
    assert torch.equal(more.w13[1], whole.w13[5] + 1.0)
    assert torch.equal(more.w2, whole.w2[[2, 5, 6]])
    assert more.num_bytes == 3 * 4 * 3 * 48 * 36
    none = load_experts(path, config, 1, (), held=more, **options)
    assert (none.ids, none.num_bytes) == ((), 0)


def test_experts_that_come_later_are_checked_like_the_rest(checkpoint_factory, tmp_path):
    source = checkpoint_factory("olmoe", 0)
    config = load_model_config(source)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    options = {"dtype": torch.float32, "device": "cpu"}
    assert load_experts(tmp_path, config, 1, (2, 4), **options).ids == (2, 4)
    with pytest.raises(CheckpointError, match=rf"{name} has shape \[35, 48\], expected \[36, 48\]"):
        load_experts(tmp_path, config, 1, (2, 3), **options)
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors file"):
        load_experts(tmp_path / "gone", config, 1, (2, 3), **options)


def test_a_model_changes_its_experts(checkpoint_factory):
    path = checkpoint_factory("olmoe", 0)
    model, whole = load(path, Blocks(False, {0: (1, 2), 1: (1, 2)})), load(path)
    before = model.parameter_bytes
    options = {"dtype": torch.float32, "device": "cpu"}
    model.set_experts(0, load_experts(path, model.config, 0, (0, 2, 6), **options))
    model.set_experts(1, load_experts(path, model.config, 1, (), **options))
    assert model.parameter_bytes == before * 3 // 4
    assert model.held_experts == {0: (0, 2, 6)}
    ids, weights = torch.tensor([[6, 0], [2, -1]], dtype=torch.int16), torch.tensor([[0.5, 0.25], [1.0, 0.0]])
    hidden = torch.randn(2, model.config.hidden_size)
    ours, expected = (m.experts(0, hidden, ids, weights) for m in (model, whole))
    assert torch.equal(ours, expected)

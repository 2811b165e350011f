"""Which kernels a worker gets, what is refused, and int8 weights from loading to experts that come and go."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from amoe.config import EngineConfig
from amoe.engine.model_loading import kernels_text, load_worker_model, uses_native
from amoe.errors import ConfigError
from amoe.kernels import native
from amoe.kernels.attention import AttentionBatch, ChunkSpan
from amoe.kernels.native import reference
from amoe.kernels.native.packing import PackedExperts
from amoe.models.config import load_model_config
from amoe.models.loader import Blocks, load_experts_for, load_model, load_native_model
from amoe.models.model import Model
from amoe.models.native_model import NativeModel
from tests.checkpoints import ARCHES

needs_native = pytest.mark.skipif(not native.is_available(), reason="the native kernels are not built")
CPU = torch.device("cpu")
TOKENS = torch.tensor([4, 90, 33, 33, 7, 61, 0, 100, 12, 55, 2, 3, 5, 8, 13, 21, 34])


def model_config(checkpoint_factory: Any, **changes: Any) -> Any:
    return dataclasses.replace(load_model_config(checkpoint_factory("qwen3_moe", 0)), **changes)


def config_of(path: Any = "model", **options: Any) -> EngineConfig:
    return EngineConfig(model=str(path), **options)


# ---- the choice


@needs_native
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_the_native_kernels_are_for_cpus(checkpoint_factory: Any, monkeypatch: Any, dtype: torch.dtype) -> None:
    model = model_config(checkpoint_factory)
    monkeypatch.setattr(native, "instruction_sets", lambda: ["generic", "avx2", "avx512"])
    monkeypatch.delenv(native.ISA_VARIABLE, raising=False)
    assert uses_native(config_of(), model, dtype, CPU)
    assert not uses_native(config_of(), model, dtype, torch.device("cuda"))
    assert not uses_native(config_of(kernels="torch"), model, dtype, CPU)


@needs_native
def test_torch_serves_where_the_kernels_know_nothing_of_the_processor(
    checkpoint_factory: Any, monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setenv(native.ISA_VARIABLE, "generic")
    model = model_config(checkpoint_factory)
    assert not uses_native(config_of(), model, torch.bfloat16, CPU)
    assert uses_native(config_of(kernels="native"), model, torch.bfloat16, CPU)
    assert uses_native(config_of(quantization="int8"), model, torch.bfloat16, CPU)
    why = "the native kernels are fast with AVX-512 only, and this is generic"
    assert caplog.messages == [f"torch kernels: {why}", *[f"native kernels: {why}"] * 2]


def test_torch_serves_where_the_extension_is_not_built(checkpoint_factory: Any, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setattr(native, "fault", lambda: "have not been built: install it")
    model = model_config(checkpoint_factory)
    assert not uses_native(config_of(), model, torch.bfloat16, CPU)
    assert caplog.messages == ["torch kernels: the native kernels have not been built: install it"]
    assert not uses_native(config_of(), model, torch.bfloat16, torch.device("cuda"))
    assert not uses_native(config_of(kernels="torch"), model, torch.bfloat16, CPU)
    assert len(caplog.messages) == 1, "nobody misses them there"


@pytest.mark.parametrize(
    ("options", "asked"),
    [({"kernels": "native"}, "--kernels native"), ({"quantization": "int8"}, "--quantization int8")],
)
def test_what_is_asked_for_and_cannot_be_had_is_refused(
    checkpoint_factory: Any, monkeypatch: Any, options: dict[str, Any], asked: str
) -> None:
    model, config = model_config(checkpoint_factory), config_of(**options)
    monkeypatch.setattr(native, "fault", lambda: "")
    with pytest.raises(ConfigError, match=f"{asked}: the native kernels are for CPUs"):
        uses_native(config, model, torch.bfloat16, torch.device("cuda"))
    monkeypatch.setattr(native, "fault", lambda: "have not been built: install it")
    with pytest.raises(ConfigError, match=f"{asked}: the native kernels have not been built: install it"):
        uses_native(config, model, torch.bfloat16, CPU)


@needs_native
@pytest.mark.parametrize("width", ["moe_intermediate_size", "intermediate_size", "shared_expert_intermediate_size"])
def test_pairs_of_numbers_need_even_widths(checkpoint_factory: Any, monkeypatch: Any, width: str) -> None:
    monkeypatch.setattr(native, "instruction_sets", lambda: ["avx512"])
    monkeypatch.delenv(native.ISA_VARIABLE, raising=False)
    odd = model_config(checkpoint_factory, **{width: 37})
    assert not uses_native(config_of(), odd, torch.bfloat16, CPU)
    assert uses_native(config_of(), odd, torch.float32, CPU), "it takes single numbers"
    for options in ({"kernels": "native"}, {"quantization": "int8"}):
        with pytest.raises(ConfigError, match="even widths"):
            uses_native(config_of(**options), odd, torch.bfloat16, CPU)
    with pytest.raises(ConfigError, match="--quantization int8: the native kernels take even widths"):
        uses_native(config_of(quantization="int8"), odd, torch.float32, CPU)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"quantization": "int8", "kernels": "torch"}, "--quantization needs the native kernels"),
        ({"quantization": "int8", "device": "cuda:1"}, "--quantization int8 is for --device cpu, not cuda:1"),
        ({"quantization": "int4"}, "--quantization must be int8, not 'int4'"),
        ({"kernels": "cuda"}, "--kernels must be one of auto, native, torch, not 'cuda'"),
    ],
)
def test_flags_that_make_no_sense(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        config_of(**options)


# ---- loading


@pytest.fixture
def keeps_torch_threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def worker_model(path: Any, **options: Any) -> Any:
    """What one worker that holds everything computes with."""
    config = config_of(path, threads_per_worker=1, **options)
    shape = load_model_config(path)
    owners = np.zeros((shape.num_layers, shape.num_experts), np.int16)
    return load_worker_model(config, shape, owners, 0, CPU, lambda done, total: None)


@needs_native
@pytest.mark.usefixtures("keeps_torch_threads")
def test_a_worker_gets_the_model_of_its_kernels(checkpoint_factory: Any) -> None:
    path = checkpoint_factory("qwen3_moe", 0)
    by_torch = worker_model(path, kernels="torch")
    assert isinstance(by_torch, Model)
    assert kernels_text(by_torch) == "torch kernels"
    plain = worker_model(path, kernels="native")
    assert isinstance(plain, NativeModel)
    assert not plain.is_quantized
    assert torch.get_num_threads() == 1
    assert kernels_text(plain) == f"native kernels for {native.choose_isa()}"
    quantized = worker_model(path, quantization="int8")
    assert quantized.is_quantized
    assert kernels_text(quantized) == f"native kernels for {native.choose_isa()}, int8 weights"


def load(path: Any, blocks: Blocks | None = None, *, quantize: bool = False, dtype: Any = torch.float32) -> NativeModel:
    config = load_model_config(path)
    context = native.make_context(dtype, 2)
    return load_native_model(path, config, blocks or Blocks.whole(config), context, dtype=dtype, quantize=quantize)


@torch.inference_mode()
def logits_of(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """[n, V] of one prompt."""
    count, blocks = len(tokens), -(-len(tokens) // 16)
    kv, table, none = model.new_kv_cache(blocks, 16), torch.arange(blocks), torch.empty(0, dtype=torch.int64)
    batch = AttentionBatch(torch.arange(count), 0, none.view(0, 0), none, 0, [ChunkSpan(0, count, table, count)])
    residual = model.embed(tokens)
    for layer in range(model.config.num_layers):
        out = model.attention(layer, residual, torch.arange(count), kv, batch)
        residual = out.residual
        if out.moe_input is not None:
            residual = model.experts(layer, out.moe_input, out.topk_ids, out.topk_weights, residual=residual)
    return model.head(residual)


def dequantized(path: Any, ours: NativeModel) -> Model:
    """The torch model with the weights that int8 has left of them."""
    config = ours.config
    model = load_model(path, config, Blocks.whole(config), dtype=torch.float32, device="cpu")
    assert model.weights.head is not None and ours.weights.head is not None
    model.weights.head.lm_head.copy_(reference.unpacked_matrix(ours.weights.head.lm_head))
    for layer, (weights, packed) in enumerate(zip(model.weights.attention, ours.weights.attention, strict=True)):
        weights.qkv.copy_(reference.unpacked_matrix(packed.qkv))
        weights.out.copy_(reference.unpacked_matrix(packed.out))
        for plain, mlp in ((weights.shared, packed.shared), (weights.mlp, packed.mlp)):
            if plain is not None:
                put(mlp, 0, plain.gate_up, plain.down)
        if layer in ours.weights.experts:
            experts = model.weights.experts[layer]
            for local in range(len(experts.ids)):
                put(ours.weights.experts[layer], local, experts.w13[local], experts.w2[local])
    return model


def put(packed: Any, local: int, w13: torch.Tensor, w2: torch.Tensor) -> None:
    for tensor, left in zip((w13, w2), reference.unpacked_expert(packed, local, *w2.shape), strict=True):
        assert 0 < (tensor - left).abs().max() < 0.01 * tensor.abs().max()
        tensor.copy_(left)


@needs_native
@pytest.mark.parametrize("arch", ARCHES)
def test_int8_computes_with_the_numbers_that_are_left(checkpoint_factory: Any, arch: str) -> None:
    path = checkpoint_factory(arch, 0)
    ours = load(path, quantize=True)
    torch.testing.assert_close(logits_of(ours), logits_of(dequantized(path, ours)), rtol=1e-3, atol=1e-3)
    assert not torch.equal(logits_of(ours), logits_of(load(path)))


@needs_native
@pytest.mark.parametrize("arch", ARCHES)
def test_bytes_of_int8_are_a_byte_for_each_number_and_a_scale_for_each_row(checkpoint_factory: Any, arch: str) -> None:
    path = checkpoint_factory(arch, 0)
    model = load(path, quantize=True, dtype=torch.bfloat16)
    head, layers = model.weights.head, model.weights.attention
    assert head is not None
    expected = head.embedding.nbytes + head.norm.nbytes + head.lm_head.nbytes
    for weights in layers:
        expected += weights.qkv.nbytes + weights.out.nbytes
        for matrix in (weights.qkv, weights.out, head.lm_head):
            assert matrix.nbytes == matrix.data.numel() * 2 + 4 * len(matrix.data) * 32
        names = ("input_norm", "post_norm", "qkv_bias", "q_norm", "k_norm", "shared_gate", "router")
        expected += sum(part.nbytes for name in names if (part := getattr(weights, name)) is not None)
        expected += sum(part.num_bytes for part in (weights.shared, weights.mlp) if part is not None)
    expected += sum(experts.num_bytes for experts in model.weights.experts.values())
    assert model.parameter_bytes == expected
    assert model.parameter_bytes < load(path, dtype=torch.bfloat16).parameter_bytes


# ---- experts that come and go


@needs_native
@pytest.mark.parametrize("quantize", [False, True])
def test_experts_that_are_here_are_copied(checkpoint_factory: Any, monkeypatch: Any, quantize: bool) -> None:
    """And the rest computes and counts as in a model that has held them from the start."""
    path = checkpoint_factory("qwen3_moe", 0)
    model = load(path, Blocks(False, {1: (0, 1)}), quantize=quantize)
    packed = spy_on_packing(monkeypatch)
    for ids in ((1, 4, 6), (), (0, 2, 3, 5), (3,)):
        kept = set(ids) & set(model.held_experts.get(1, ()))
        packed.clear()
        loaded = load_experts_for(model, path, 1, ids)
        assert len(packed) == len(ids) - len(kept)
        model.set_experts(1, loaded)
        fresh = load(path, Blocks(False, {1: ids}), quantize=quantize)
        assert model.held_experts == fresh.held_experts == ({1: ids} if ids else {})
        assert model.parameter_bytes == fresh.parameter_bytes
        if ids:
            assert torch.equal(experts_of(model, ids), experts_of(fresh, ids))


def spy_on_packing(monkeypatch: Any) -> list[int]:
    """Local experts, as they are packed."""
    packed: list[int] = []
    real = PackedExperts.put

    def put(self: PackedExperts, local: int, w13: torch.Tensor, w2: torch.Tensor) -> None:
        packed.append(local)
        real(self, local, w13, w2)

    monkeypatch.setattr(PackedExperts, "put", put)
    return packed


def experts_of(model: NativeModel, ids: tuple[int, ...]) -> torch.Tensor:
    hidden = torch.randn(5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    pairs = torch.tensor([[ids[0], ids[-1] if len(ids) > 1 else -1], [-1, ids[-1]]]).repeat(3, 1)[:5]
    return model.experts(1, hidden, pairs, torch.full(pairs.shape, 0.5))

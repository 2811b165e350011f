"""What the native model keeps from step to step, and what it refuses before the kernels would read foreign memory."""

from __future__ import annotations

import mmap
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from amoe.kernels.attention import AttentionBatch, ChunkSpan
from amoe.kernels.native import make_context
from amoe.models.config import load_model_config
from amoe.models.loader import Blocks, load_experts_for, load_native_model
from amoe.models.native_model import NativeModel
from tests.unit.kernels.native_cases import needs_native, resident

pytestmark = needs_native


@pytest.fixture(name="model")
def fixture_model(checkpoint_factory: Any) -> NativeModel:
    path = checkpoint_factory("qwen3_moe", 0)
    config = load_model_config(path)
    return load_native_model(path, config, Blocks.whole(config), make_context(torch.float32, 2), dtype=torch.float32)


def chunk(start: int, end: int, slots: torch.Tensor | None = None) -> AttentionBatch:
    """Tokens [start, end) of one sequence, whose blocks of 4 are the first ones."""
    none = torch.empty(0, dtype=torch.int64)
    slots = torch.arange(start, end) if slots is None else slots
    return AttentionBatch(slots, 0, none.view(0, 0), none, 0, [ChunkSpan(0, end - start, torch.arange(4), end)])


def residuals(model: NativeModel, count: int) -> torch.Tensor:
    return torch.randn(count, model.config.hidden_size, generator=torch.Generator().manual_seed(0))


def test_logits_stay_in_one_place_and_are_those_of_the_last_head(model: NativeModel) -> None:
    x = residuals(model, 5)
    first = model.head(x).clone()
    logits = model.head(x)
    logits.fill_(7)  # as the sampler may
    again = model.head(x[2:4])
    assert again.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(again, first[2:4], rtol=0, atol=0)
    assert model.head(residuals(model, 50)).shape == (50, model.config.vocab_size)
    assert model.head(x[:0]).shape == (0, model.config.vocab_size)


def test_positions_end_where_sequences_do(model: NativeModel) -> None:
    kv = model.new_kv_cache(4, 4, max_len=6)
    for layer in kv.layers:
        layer.zero_()  # positions 0 to 3 are read, and nobody writes them here
    x = residuals(model, 2)
    inside = model.attention(0, x, torch.tensor([4, 5]), kv, chunk(4, 6))
    with pytest.raises(AssertionError, match="positions from 5 to 6, and there are 6"):
        model.attention(0, x, torch.tensor([5, 6]), kv, chunk(5, 7))
    with pytest.raises(AssertionError, match="positions from 5 to 6, and there are 6"):
        model.forward(x, torch.tensor([5, 6]), kv, chunk(5, 7), None, time.monotonic)
    whole = model.new_kv_cache(4, 4)
    for layer, kept in enumerate(kv.layers):
        whole.layers[layer].copy_(kept)
    longer = model.attention(0, x, torch.tensor([4, 5]), whole, chunk(4, 6))
    assert torch.equal(inside.residual, longer.residual), "the table of the longest sequence begins with the same rows"


def test_slots_outside_of_the_cache_are_refused(model: NativeModel) -> None:
    kv = model.new_kv_cache(4, 4)
    for slots in (torch.tensor([3, 16]), torch.tensor([-1, 3])):
        with pytest.raises(AssertionError, match=r"slots from .* and there are 16"):
            model.attention(0, residuals(model, 2), torch.arange(2), kv, chunk(0, 2, slots))


def test_other_types_and_strides_are_refused(model: NativeModel) -> None:
    kv, x, positions = model.new_kv_cache(4, 4), residuals(model, 4), torch.arange(4)
    with pytest.raises(AssertionError, match=r"torch\.int32 instead of torch\.int64"):
        model.attention(0, x, positions.int(), kv, chunk(0, 4))
    with pytest.raises(AssertionError, match=r"torch\.bfloat16 instead of torch\.float32"):
        model.attention(0, x.bfloat16(), positions, kv, chunk(0, 4))
    with pytest.raises(AssertionError, match="strides"):
        model.forward(residuals(model, 8)[::2], positions, kv, chunk(0, 4), None, time.monotonic)
    ids, weights = torch.zeros(4, 1, dtype=torch.int16), torch.ones(4, 1)
    with pytest.raises(AssertionError, match="strides"):
        model.experts(0, x.T.contiguous().T, ids, weights)
    with pytest.raises(AssertionError, match=r"torch\.int32 instead of torch\.int64"):
        model.experts(0, x, ids, weights, rows=positions.int())


def test_experts_come_and_go_beside_those_that_are_computed_with(checkpoint_factory: Any) -> None:
    """In memory of their own pages, some of which are given back again and again."""
    sizes = {"hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 8, "num_hidden_layers": 1}
    path = checkpoint_factory("qwen3_moe", 0, **sizes)
    config = load_model_config(path)
    blocks, context = Blocks(attention=False, experts={0: (0, 3, 4)}), make_context(torch.float32, 1)
    model = load_native_model(path, config, blocks, context, dtype=torch.float32)
    hidden, pairs, weights = residuals(model, 6), torch.tensor([[0, 3], [4, -1]]).repeat(3, 1), torch.full((6, 2), 0.5)
    expected = model.experts(0, hidden, pairs, weights)
    with ThreadPoolExecutor(1) as thread:
        for ids in ((0, 1, 2, 3, 4, 5), (0, 2, 3, 4), (0, 2, 3, 4, 6, 7), (0, 3, 4), tuple(range(8)), (0, 3, 4)):
            loading = thread.submit(load_experts_for, model, path, 0, ids)
            is_over = False
            while not is_over:
                is_over = loading.done()
                assert torch.equal(model.experts(0, hidden, pairs, weights), expected)
            model.set_experts(0, loading.result())
            assert torch.equal(model.experts(0, hidden, pairs, weights), expected)
            fresh = load_native_model(path, config, Blocks(False, {0: ids}), context, dtype=torch.float32)
            for expert in ids:
                one = torch.full((6, 1), expert), torch.ones(6, 1)
                assert torch.equal(model.experts(0, hidden, *one), fresh.experts(0, hidden, *one)), expert


def test_experts_that_are_not_set_after_all_leave_no_memory_behind(checkpoint_factory: Any) -> None:
    path = checkpoint_factory("qwen3_moe", 0, hidden_size=256, moe_intermediate_size=512)
    config = load_model_config(path)
    blocks, context = Blocks(attention=False, experts={0: (0, 1)}), make_context(torch.float32, 1)
    model = load_native_model(path, config, blocks, context, dtype=torch.float32)
    memory = model.weights.experts[0].w13
    before = resident(memory)
    loaded = load_experts_for(model, path, 0, (0, 1, 2, 3, 4))
    assert resident(memory) >= before + 2 * memory[0].nbytes
    del loaded
    model.discard_experts(0)
    assert resident(memory) <= before + 2 * mmap.PAGESIZE
    model.discard_experts(1)  # of which it holds none

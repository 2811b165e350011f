"""Whoever looks at a model while it takes tokens through its layers sees it get on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from amoe.kernels.attention import AttentionBatch, ChunkSpan
from amoe.kernels.native import instruction_sets, make_context
from amoe.models.config import load_model_config
from amoe.models.loader import Blocks, load_model, load_native_model
from amoe.models.worker_model import WorkerModel


def whole(path: Path, isa: str | None) -> WorkerModel:
    config = load_model_config(path)
    blocks, dtype = Blocks.whole(config), torch.float32
    if isa is None:
        return load_model(path, config, blocks, dtype=dtype, device="cpu")
    return load_native_model(path, config, blocks, make_context(dtype, 2, isa=isa), dtype=dtype)


@pytest.mark.parametrize("isa", [None, *instruction_sets()])
@torch.inference_mode()
def test_each_layer_counts(checkpoint_factory: Any, isa: str | None):
    model = whole(checkpoint_factory("qwen3_moe", 0, num_hidden_layers=3, mlp_only_layers=[1]), isa)
    kv, none = model.new_kv_cache(1, 16), torch.empty(0, dtype=torch.int64)
    assert model.progress == 0
    for count in (1, 2):
        batch = AttentionBatch(torch.arange(4), 0, none.view(0, 0), none, 0, [ChunkSpan(0, 4, torch.arange(1), 4)])
        residual = model.embed(torch.tensor([3, 1, 4, 1]))
        model.forward(residual, torch.arange(4), kv, batch, torch.tensor([3]), time.monotonic)
        assert model.progress == 3 * count

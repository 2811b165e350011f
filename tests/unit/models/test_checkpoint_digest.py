"""Hosts with different models must notice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from amoe.models.checkpoint import checkpoint_digest


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Large enough that not all of it is sampled."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"hidden_size": 64}')
    for number in (1, 2):
        tensors = {f"w{number}.{i}": torch.randn(64, 1024, generator=torch.manual_seed(number)) for i in range(4)}
        save_file(tensors, directory / f"model-{number}.safetensors")
    return directory


def test_the_same_files_have_the_same_digest_wherever_they_lie(checkpoint: Path, tmp_path: Path):
    before = checkpoint_digest(checkpoint)
    assert before != 0
    assert checkpoint_digest(str(checkpoint.rename(tmp_path / "elsewhere"))) == before


def test_another_training_of_the_same_model_differs(checkpoint: Path):
    before = checkpoint_digest(checkpoint)
    file = checkpoint / "model-2.safetensors"
    save_file({name: tensor + 0.01 for name, tensor in load_file(file).items()}, file)
    assert checkpoint_digest(checkpoint) != before


@pytest.mark.parametrize("change", ["config", "name", "missing", "truncated"])
def test_every_file_counts(checkpoint: Path, change: str):
    before, file = checkpoint_digest(checkpoint), checkpoint / "model-2.safetensors"
    if change == "config":
        (checkpoint / "config.json").write_text('{"hidden_size": 65}')
    elif change == "name":
        file.rename(checkpoint / "model-3.safetensors")
    elif change == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    assert checkpoint_digest(checkpoint) != before


def test_an_empty_directory_has_one_too(tmp_path: Path):
    assert checkpoint_digest(tmp_path) != 0

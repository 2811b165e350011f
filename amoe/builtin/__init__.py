"""The model that `amoe` carries with it, so that a newcomer needs no download.

A small Qwen3-MoE checkpoint in Hugging Face format, trained on the Python standard library by `amoe.builtin.train`.
Importing this package needs nothing but the standard library.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["builtin_model_path"]


def builtin_model_path() -> Path:
    """Directory of the built-in checkpoint (config, tokenizer, safetensors)."""
    path = Path(__file__).resolve().parent / "model"
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"the built-in model is missing from {path}: reinstall amoe with its package data")
    return path

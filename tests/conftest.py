"""Fixtures that all tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_checkpoint


@pytest.fixture(scope="session")
def checkpoint_factory(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_checkpoint(arch, seed, **options)` that makes each checkpoint once per session. Do not write into them."""
    made: dict[str, Path] = {}

    def factory(arch: str, seed: int = 0, **options: Any) -> Path:
        key = f"{arch}-{seed}-{sorted(options.items())!r}"
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp(arch) / "model", arch, seed, **options)
        return made[key]

    return factory

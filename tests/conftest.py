"""Fixtures that all tests share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from tests.checkpoints import make_checkpoint

# `make test` draws the same examples every time; `make test-all` (--hypothesis-profile=thorough) draws many new ones.
settings.register_profile("same", deadline=None, database=None, derandomize=True)
settings.register_profile("thorough", deadline=None, database=None, max_examples=1000, print_blob=True)
settings.load_profile("same")

# Tests run side by side, and beside the servers that they start: more threads of torch here would spend their time
# on waiting for each other. Workers have as many as they are told.
torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that fails shows what its servers have said: fixtures that tell it by `printed()`."""
    report = yield
    if report.failed:
        for name, value in getattr(item, "funcargs", {}).items():
            if callable(printed := getattr(value, "printed", None)):
                report.sections.append((f"what {name} has said", printed()))
    return report


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A test that configures logging must not leave a handler behind that writes to its captured, closed stderr."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


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

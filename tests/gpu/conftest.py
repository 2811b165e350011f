"""The device of the GPU tests: `--device cuda` unless said otherwise (`cpu` tries the tests themselves)."""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda", help="device of tests/gpu")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    name = request.config.getoption("--device")
    if name != "cpu" and not torch.get_device_module(name).is_available():
        pytest.skip(f"no {name} device here")
    return name

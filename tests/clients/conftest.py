"""The server that all clients meet."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.served import ServedModel

# litellm and others look things up at import and report home: there is no network in a test.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
os.environ.setdefault("LANGSMITH_TRACING", "false")
os.environ.setdefault("ANONYMIZED_TELEMETRY", "false")


@pytest.fixture(scope="session")
def served() -> Iterator[ServedModel]:
    with ServedModel() as server:
        yield server

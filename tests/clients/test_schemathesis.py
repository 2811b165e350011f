"""Requests made from the server's own /openapi.json, right ones and wrong ones: never a 5xx."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from tests.served import ServedModel

EXAMPLES = 12  # per route and mode
BUSY = 503  # with Retry-After: the queue is full, as it should say


@pytest.fixture(scope="module")
def small() -> Iterator[ServedModel]:
    # A short context keeps every generation short, whatever max_tokens a request leaves out.
    with ServedModel("--max-model-len", "64", "--max-num-seqs", "8") as server:
        yield server


def fit(schemas: dict[str, Any]) -> None:
    """Tell what is true of this server alone, which no description can know: its model's name, its short context."""
    for name in ("CompletionRequest", "ChatCompletionRequest", "ResponsesRequest", "MessagesRequest", "MessagesPrompt"):
        schemas[name]["properties"]["model"] = {"enum": ["amoe-builtin", None]}
    schemas["MessagesRequest"]["properties"]["max_tokens"]["maximum"] = 16


@pytest.fixture(scope="module")
def operations(small: ServedModel) -> dict[str, schemathesis.APIOperation]:
    """By method and path."""
    schema = schemathesis.openapi.from_url(f"{small.url}/openapi.json")
    schema.config.generation.update(allow_x00=False)
    fit(schema.raw_schema["components"]["schemas"])
    return {result.ok().label: result.ok() for result in schema.get_all_operations()}


def statuses_of(operation: schemathesis.APIOperation, mode: GenerationMode) -> set[int]:
    """Send the route's requests; returns what it answered."""
    seen: set[int] = set()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: schemathesis.Case) -> None:
        response = case.call(timeout=60)
        is_busy = response.status_code == BUSY and "retry-after" in response.headers
        assert response.status_code < 500 or is_busy, f"{case.as_curl_command()}\n{response.text}"
        seen.add(response.status_code)

    with contextlib.suppress(Unsatisfiable):  # a route whose every request is right
        send()
    return seen


def test_right_requests(operations: dict[str, schemathesis.APIOperation]) -> None:
    assert len(operations) > 10
    for label, operation in operations.items():
        statuses = statuses_of(operation, GenerationMode.POSITIVE)
        if label.startswith("POST /v1/") and "{" not in label:
            assert 200 in statuses, f"no request that {label} describes as right was served: {statuses}"


def test_wrong_requests(operations: dict[str, schemathesis.APIOperation]) -> None:
    for operation in operations.values():
        if operation.body or operation.query or operation.path_parameters:  # else nothing in it can be wrong
            statuses_of(operation, GenerationMode.NEGATIVE)


def test_the_engine_has_survived(small: ServedModel) -> None:
    assert small.works()
    assert not small.tracebacks(), small.tracebacks()

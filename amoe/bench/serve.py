"""Measures a server with OpenAI's API over HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import httpx

from amoe.bench.client import ServerClient, list_models
from amoe.bench.load import LoadGenerator, LoadResult, Progress
from amoe.bench.workload import RequestSpec
from amoe.clock import Clock
from amoe.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ServePlan:
    """One measurement.

    Attributes:
        warmup, specs: requests; those of the warm-up are not measured.
        arrivals: [len(specs)] seconds after the start; empty if `concurrency` says how many are under way.
        concurrency: requests under way (in the warm-up always).
        body: fields of every request.
    """

    warmup: list[RequestSpec]
    specs: list[RequestSpec]
    arrivals: Sequence[float]
    concurrency: int
    body: dict[str, Any]


def http_client(
    base_url: str, timeout_s: float, transport: httpx.AsyncBaseTransport | None = None
) -> httpx.AsyncClient:
    """A client that never waits for a free connection: queueing is the server's to do, and to be measured."""
    return httpx.AsyncClient(
        base_url=base_url.rstrip("/").removesuffix("/v1"),
        timeout=httpx.Timeout(timeout_s, pool=None),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        transport=transport,
        trust_env=False,  # no proxy between the clock and the server
    )


async def choose_model(http: httpx.AsyncClient, name: str | None) -> dict[str, Any]:
    """The model card of `name`, or of the first model.

    Raises:
        AmoeError: the server cannot be reached.
        ConfigError: it does not serve that model.
    """
    models = await list_models(http)
    for model in models:
        if name in (None, model["id"]):
            return model
    names = ", ".join(model["id"] for model in models)
    raise ConfigError(f"--model {name}: the server has no such model, but {names}")


async def measure(
    http: httpx.AsyncClient,
    model: str,
    plan: ServePlan,
    clock: Clock,
    progress: AbstractContextManager[Progress],
) -> LoadResult:
    """Warm up, then measure."""
    send = ServerClient(http, clock, model=model, body=plan.body).send
    if plan.warmup:
        warmed = await LoadGenerator(send, clock).with_concurrency(plan.warmup, plan.concurrency)
        if warmed.interrupted:
            return LoadResult([], interrupted=True)
    with progress as shown:
        load = LoadGenerator(send, clock, shown)
        if len(plan.arrivals):
            return await load.at_times(plan.specs, plan.arrivals)
        return await load.with_concurrency(plan.specs, plan.concurrency)

"""What probes, scrapers and load balancers ask for."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Response

from amoe import __version__, metrics
from amoe.server.admin import cluster_stats
from amoe.server.context import ServerContext
from amoe.server.encoding import json_response
from amoe.server.request_record import RequestRecord


class LoadCounter:
    """Counts the requests that are open. An observer of `RequestScope`."""

    def __init__(self) -> None:
        self.num_open = 0

    def began(self, record: RequestRecord) -> None:
        """One more; what only reads (probes, lists, documents) is no load."""
        self.num_open += record.method == "POST"

    def ended(self, record: RequestRecord) -> None:
        """One less."""
        self.num_open -= record.method == "POST"


def operations_router(context: ServerContext, load: LoadCounter) -> APIRouter:
    """The routes, over `context`."""
    router = APIRouter()
    engine = context.engine

    @router.get("/health")
    @router.get("/ping")
    @router.post("/ping")
    async def health() -> Response:
        """200 while every worker makes progress or is being replaced, else 503. It has a body only where there is
        something to tell: what is the matter, and with which worker. It stays 200 while the server drains, when nothing
        listens any more, and new requests on old connections are answered 503."""
        if complaint := engine.complaint:
            return json_response({"status": "unhealthy", "reason": complaint}, 503)
        return json_response({"status": "degraded", "reason": engine.note}) if engine.note else Response()

    @router.get("/version")
    async def version() -> Response:
        """The version of amoe."""
        return json_response({"version": __version__})

    @router.get("/load")
    async def server_load() -> Response:
        """Requests that are open (`server_load`, as in vLLM), and what they are to the workers, as last heard."""
        workers = engine.metrics.workers.values()
        return json_response(
            {
                "server_load": load.num_open,
                "num_sequences_open": engine.num_open,
                "num_requests_running": sum(worker.num_running for worker in workers),
                "num_requests_waiting": sum(worker.num_waiting for worker in workers),
            }
        )

    @router.get("/metrics")
    async def expose_metrics() -> Response:
        """Prometheus text."""
        if context.admin is not None:
            engine.metrics.clustered(cluster_stats((await context.admin.look()).status))
        text = await asyncio.to_thread(engine.metrics.render)  # it may take long: streams go on meanwhile
        return Response(text, headers={"Content-Type": metrics.CONTENT_TYPE})

    return router

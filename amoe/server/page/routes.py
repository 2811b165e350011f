"""`/` and its files, and `/live`."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

from amoe.server.context import ServerContext
from amoe.server.page.assets import load_assets
from amoe.server.page.source import LiveSource


def page_router(context: ServerContext) -> APIRouter:
    """The routes of the live view.

    The files are those of this package, the same at every server; all data comes from `/live` and the API.
    """
    router = APIRouter()
    assets = load_assets()
    source = LiveSource(context)

    @router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(request: Request) -> Response:
        """The live view."""
        return assets["index.html"].response(request.headers.get("if-none-match"))

    @router.api_route("/page/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    async def asset(name: str, request: Request) -> Response:
        """A style sheet or script of the live view."""
        if name not in assets:
            raise HTTPException(404)
        return assets[name].response(request.headers.get("if-none-match"))

    @router.get("/live")
    async def live() -> Response:
        """What the page shows: workers, queues, experts, throughput and latency, as JSON."""
        return Response(await source.read(), headers={"Cache-Control": "no-store"}, media_type="application/json")

    return router

"""GET /v1/models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from amoe.server.context import ServerContext
from amoe.server.encoding import json_response


def models_router(context: ServerContext) -> APIRouter:
    """The routes, over `context`."""
    router = APIRouter()

    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": context.created,
            "owned_by": "amoe",
            "root": context.model_names[0],
            "parent": None,
            "max_model_len": context.engine.model.max_model_len,
        }

    @router.get("/v1/models")
    async def list_models() -> Response:
        """The served names."""
        return json_response({"object": "list", "data": [card(name) for name in context.model_names]})

    @router.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Response:
        """One served name."""
        return json_response(card(context.resolve_model(name)))

    return router

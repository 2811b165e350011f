"""What /openapi.json says of answers: an example of each, and the one shape of errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str = Field(description="For the person who has to act on it.")
    type: str = Field(description="BadRequestError, NotFoundError, ServiceUnavailableError, ...")
    param: str | None = Field(description="The field of the request that is wrong, such as messages.0.role.")
    code: int = Field(description="The HTTP status.")


class ErrorResponse(BaseModel):
    """Every error of every route. In a stream that has begun it comes as an event, before the last one."""

    error: ErrorDetail


def responses(example: Mapping[str, Any], *, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """The answers of a route, for FastAPI's `responses`.

    Args:
        example: of a whole answer.
        streams: it may also be a stream of events.
    """
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}, "example": dict(example)}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}, "example": "data: {...}\n\ndata: [DONE]\n\n"}
    return {
        200: {"description": "The answer, whole or as a stream of events.", "content": content},
        "4XX": {"description": "The request is wrong, or may not be served.", "model": ErrorResponse},
        503: {"description": "No room now, or the engine is not healthy.", "model": ErrorResponse},
    }

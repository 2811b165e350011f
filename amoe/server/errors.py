"""Errors as users see them: always `{"error": {"message", "type", "param", "code"}}`, never a traceback."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from amoe.errors import AmoeError, EngineDeadError, EngineOverloadedError, QuotingError, RequestError
from amoe.server.encoding import json_response
from amoe.server.request_record import note_error

logger = logging.getLogger(__name__)

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    409: "ConflictError",
    413: "RequestTooLargeError",
    431: "HeadersTooLargeError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


class NotFoundError(RequestError):
    """The request names something that is not here (HTTP 404)."""


class ConflictError(AmoeError):
    """The request is right, and the server as it is cannot do it (HTTP 409)."""


class ModelNotFoundError(NotFoundError):
    """The request names a model that is not served."""


def error_body(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    """The JSON of an error that the client is about to be told; the request's line in the log tells it too."""
    note_error(message)
    kind = TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def describe(error: Exception) -> tuple[int, dict[str, Any]]:
    """HTTP status and JSON of any error. What nobody raised on purpose is logged, and told without its details."""
    if isinstance(error, RequestValidationError):
        details = error.errors()
        message, param = _validation_message(details[0] if details else {})
        return 400, error_body(message, 400, param)
    if isinstance(error, HTTPException):
        return error.status_code, error_body(str(error.detail), error.status_code)
    if isinstance(error, NotFoundError):
        return 404, error_body(str(error), 404, error.param)
    if isinstance(error, RequestError):
        return 400, error_body(str(error), 400, error.param)
    if isinstance(error, ConflictError):
        return 409, error_body(str(error), 409)
    if isinstance(error, EngineOverloadedError | EngineDeadError):
        return 503, error_body(str(error), 503)
    if isinstance(error, AmoeError):
        return 500, error_body(str(error), 500)
    logger.error("a request failed", exc_info=error)
    return 500, error_body("the server failed to handle this request; its log says why", 500)


def error_response(error: Exception) -> Response:
    """The response to a request that failed with `error`."""
    status, body = describe(error)
    if isinstance(error, QuotingError):
        note_error(str(error).partition(":")[0])
    return json_response(body, status, _retry_headers(error))


def _retry_headers(error: Exception) -> dict[str, str]:
    """When to come again: in seconds for everybody, in milliseconds for OpenAI's clients, which prefer that."""
    if not isinstance(error, EngineOverloadedError):
        return {}
    return {"Retry-After": str(error.retry_after_s), "retry-after-ms": str(error.retry_after_s * 1000)}


def _field_path(location: Sequence[str | int]) -> str:
    """`("body", "messages", 0, "role")` → `messages.0.role`, without the names that pydantic gives to union members."""
    parts = [str(part) for part in location if not (isinstance(part, str) and not part.isidentifier())]
    return ".".join(parts[1:] if parts[:1] == ["body"] else parts)


def _validation_message(detail: Mapping[str, Any]) -> tuple[str, str | None]:
    if detail.get("type") == "json_invalid":
        return f"the body is not valid JSON: {detail.get('ctx', {}).get('error', 'syntax error')}", None
    path = _field_path(detail.get("loc", ()))
    message = str(detail.get("msg", "invalid")).removeprefix("Value error, ")
    if not path:
        return f"the body must be a JSON object sent as Content-Type: application/json ({message})", None
    return f"{path}: {message}", path


async def _on_amoe_error(_: Request, error: Exception) -> Response:
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = error.headers if isinstance(error, HTTPException) else None
    message = str(error.detail) if isinstance(error, HTTPException) else "internal error"
    if status == 404:
        message = f"there is no route {request.method} {request.url.path}"
    elif status == 405:
        message = f"{request.url.path} does not take {request.method}"
    return json_response(error_body(message, status), status, dict(headers or {}))


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error of `app` in the one format."""
    app.add_exception_handler(AmoeError, _on_amoe_error)
    app.add_exception_handler(RequestValidationError, _on_amoe_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_amoe_error)

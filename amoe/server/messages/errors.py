"""Errors on the routes of /v1/messages, in Anthropic's shape: `{"type": "error", "error": {"type", "message"}}`."""

from __future__ import annotations

import json
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from amoe.server.encoding import json_bytes
from amoe.server.errors import describe
from amoe.server.middleware.paths import route_path

PREFIX = "/v1/messages"

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}


def error_body(message: str, status: int) -> dict[str, Any]:
    """The JSON of an error."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


def describe_in_stream(error: Exception) -> dict[str, Any]:
    """The event that tells of an error after the status has been sent."""
    status, content = describe(error)
    return error_body(content["error"]["message"], status)


class AnthropicErrors:
    """ASGI middleware: on the routes of /v1/messages, whatever comes out as an error of the usual shape, from whichever
    layer, is told in Anthropic's. Status and headers stay."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_ours = scope["type"] == "http" and route_path(scope).startswith(PREFIX)
        await self._app(scope, receive, _Rewriter(send) if is_ours else send)


class _Rewriter:
    """Holds an error back until it is whole; all else passes."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] >= 400 and _is_json(message):
            self._start = message
        elif self._start is None or message["type"] != "http.response.body":
            await self._send(message)
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._finish(self._start)

    async def _finish(self, start: Message) -> None:
        content = json.loads(self._body)
        body = json_bytes(error_body(content["error"]["message"], start["status"]))
        headers = [(name, value) for name, value in start["headers"] if name.lower() != b"content-length"]
        await self._send({**start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


def _is_json(start: Message) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"application/json")
        for name, value in start.get("headers", ())
    )

"""JSON for responses and events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import Response

_encoder = msgspec.json.Encoder()


def json_bytes(body: Mapping[str, Any]) -> bytes:
    """Compact UTF-8. Half a surrogate pair, which a user's JSON may smuggle into an error message, becomes `?`."""
    try:
        return _encoder.encode(body)
    except (UnicodeEncodeError, TypeError):  # the slow way takes more kinds of numbers, too
        finite = json.loads(json.dumps(body), parse_constant=lambda _: None)  # NaN is null, as in the fast way
        return json.dumps(finite, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def json_response(body: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A whole JSON response."""
    return Response(json_bytes(body), status, dict(headers or {}), media_type="application/json")


def event(body: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json_bytes(body) + b"\n\n"


def named_event(name: str, body: Mapping[str, Any]) -> bytes:
    """One server-sent event with a name, as /v1/responses and /v1/messages have them."""
    return b"event: " + name.encode() + b"\n" + event(body)


DONE = b"data: [DONE]\n\n"

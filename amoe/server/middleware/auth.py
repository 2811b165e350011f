"""API keys. Everything is guarded but what probes and scrapers ask for; the admin API has keys of its own."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac

from fastapi import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from amoe.server.encoding import json_response
from amoe.server.errors import error_body
from amoe.server.middleware.paths import route_path

OPEN_PATHS = frozenset({"/health", "/ping", "/metrics", "/version"})
ADMIN_PATHS = "/admin/"

_MESSAGE = (
    "no API key, or one that this server does not know: send it as `Authorization: Bearer KEY` or as `x-api-key: KEY`"
)
_NO_ADMIN = (
    "the admin API is off: start the server with --admin-key KEY, or with AMOE_ADMIN_KEY in its environment (API keys "
    "do not open it)"
)
_NOT_ADMIN = (
    "no admin key, or one that this server does not know: send it as `Authorization: Bearer KEY` or as `x-api-key: "
    "KEY` (API keys do not open the admin API)"
)
_PAGE = b"""<!doctype html><html lang="en"><meta charset="utf-8"><title>amoe: API key needed</title>
<h1>This server wants an API key</h1>
<p>Load this page again: the browser asks for a user name and a password. The password is the API key; the user name
does not matter.</p></html>
"""


def presented_key(headers: dict[bytes, bytes]) -> bytes | None:
    """The key that a request brings: as a bearer token, as `x-api-key`, or as the password of a browser's login.

    Args:
        headers: by lower-case name.
    """
    scheme, _, credentials = headers.get(b"authorization", b"").strip().partition(b" ")
    if scheme.lower() == b"bearer":
        return credentials.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(credentials.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return None
    return headers.get(b"x-api-key")


def is_known(key: bytes, digests: tuple[bytes, ...]) -> bool:
    """Whether `key` is one of those with these SHA-256 digests. Takes as long whichever it is, and whether it is."""
    digest = hashlib.sha256(key).digest()
    known = False
    for candidate in digests:
        known |= hmac.compare_digest(digest, candidate)
    return known


class ApiKeyGuard:
    """Lets in who brings a key; 401 to everybody else.

    A browser is asked for a password, so that the page at `/` can be opened; scripts are not, since a challenge would
    open a dialogue in the middle of a page.
    """

    def __init__(self, app: ASGIApp, digests: tuple[bytes, ...]) -> None:
        self._app = app
        self._digests = digests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_free(route_path(scope)):
            headers = dict(scope["headers"])
            key = presented_key(headers)
            if key is None or not is_known(key, self._digests):
                await _refusal(b"text/html" in headers.get(b"accept", b""))(scope, receive, send)
                return
        await self._app(scope, receive, send)


class AdminKeyGuard:
    """Lets nobody into the admin API but who brings an admin key; without such keys it is off.

    A browser's stored password does not count: a page of somebody else could have it sent along.
    """

    def __init__(self, app: ASGIApp, digests: tuple[bytes, ...]) -> None:
        self._app = app
        self._digests = digests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and route_path(scope).startswith(ADMIN_PATHS):
            refusal = self._refusal(dict(scope["headers"]))
            if refusal is not None:
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, headers: dict[bytes, bytes]) -> Response | None:
        if not self._digests:
            return json_response(error_body(_NO_ADMIN, 403), 403)
        is_stored = headers.get(b"authorization", b"").strip().lower().startswith(b"basic")
        key = None if is_stored else presented_key(headers)
        if key is None or not is_known(key, self._digests):
            return json_response(error_body(_NOT_ADMIN, 401), 401, {"WWW-Authenticate": 'Bearer realm="amoe admin"'})
        return None


def _is_free(path: str) -> bool:
    """Whether API keys have nothing to say here."""
    return path in OPEN_PATHS or path.startswith(ADMIN_PATHS)


def _refusal(is_browser: bool) -> Response:
    body = error_body(_MESSAGE, 401)
    if is_browser:
        headers = {"WWW-Authenticate": 'Basic realm="amoe", charset="UTF-8"', "Cache-Control": "no-store"}
        return Response(_PAGE, 401, headers, "text/html; charset=utf-8")
    return json_response(body, 401, {"WWW-Authenticate": 'Bearer realm="amoe"'})

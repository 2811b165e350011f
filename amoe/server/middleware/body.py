"""Bodies come in whole, in time, and not too large."""

from __future__ import annotations

import asyncio

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from amoe.server.encoding import json_response
from amoe.server.errors import error_body


class BodyLimit:
    """Refuses a body that is larger than `limit` bytes, before it is read where its length is told, and one that takes
    longer than `timeout_s` to come in. Until the body is there, nothing of the engine is held."""

    def __init__(self, app: ASGIApp, limit: int, timeout_s: float) -> None:
        self._app = app
        self._limit = limit
        self._timeout_s = timeout_s
        self._too_large = f"the body is larger than {limit} bytes"
        self._too_slow = f"the body did not come in within {timeout_s:g} s"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._limit:
            await json_response(error_body(self._too_large, 413), 413)(scope, receive, send)
            return
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout_s
        received, is_whole = 0, False

        async def limited() -> Message:
            nonlocal received, is_whole
            if is_whole:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, self._too_slow, {"Connection": "close"}) from None
            received += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if received > self._limit:
                raise HTTPException(413, self._too_large)
            return message

        await self._app(scope, limited, send)

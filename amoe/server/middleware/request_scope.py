"""The outermost layer: gives a request its id, watches how it ends, and answers for whatever goes wrong inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from amoe.server.errors import error_response
from amoe.server.request_record import RequestRecord, enter_record, request_id_of

# A stream of events sends its parts by this way, past the layers in between, which have nothing to say to them.
DIRECT_SEND = "amoe.send"

_TRACE_HEADERS = (b"traceparent", b"tracestate")


class Observer(Protocol):
    """Wants to know of requests."""

    def began(self, record: RequestRecord) -> None:
        """A request has come; its body perhaps not yet."""
        ...

    def ended(self, record: RequestRecord) -> None:
        """The last byte of its response is on its way, or its client has gone."""
        ...


class RequestScope:
    """Makes the `RequestRecord` of each request and tells observers of its beginning and end.

    Args:
        is_draining: whether the server wants its clients to go elsewhere.
    """

    def __init__(self, app: ASGIApp, observers: list[Observer], is_draining: Callable[[], bool]) -> None:
        self._app = app
        self._observers = observers
        self._is_draining = is_draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        record = RequestRecord(request_id_of(headers.get(b"x-request-id")), scope["method"], scope["path"])
        record.headers = {n.decode(): headers[n].decode("latin-1") for n in _TRACE_HEADERS if n in headers}
        record.client = scope["client"][0] if scope.get("client") else None
        enter_record(record)
        scope[DIRECT_SEND] = send
        for observer in self._observers:
            observer.began(record)

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                self._add_headers(message, record)
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if record.status is not None:
                raise  # too late to say so: the web server cuts the connection
            await error_response(error)(scope, receive, watched)
        finally:
            record.handler = getattr(scope.get("route"), "path", None)
            for observer in self._observers:
                observer.ended(record)

    def _add_headers(self, message: Message, record: RequestRecord) -> None:
        headers = [*message.get("headers", ()), (b"x-request-id", record.request_id.encode())]
        if self._is_draining():
            headers.append((b"connection", b"close"))
        message["headers"] = headers

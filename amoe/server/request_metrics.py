"""Counts HTTP requests as they begin and end."""

from __future__ import annotations

import time

from amoe.metrics import HttpMetrics
from amoe.server.request_record import RequestRecord


class RequestMetrics:
    """An observer of `RequestScope`. It is told of beginnings and ends only: what is streamed costs nothing here."""

    def __init__(self, metrics: HttpMetrics) -> None:
        self._metrics = metrics

    def began(self, record: RequestRecord) -> None:
        """A request has come."""
        self._metrics.began()

    def ended(self, record: RequestRecord) -> None:
        """It is answered, or its client has gone."""
        seconds = time.monotonic() - record.began_s
        self._metrics.ended(record.handler, record.method, record.status or 0, seconds)

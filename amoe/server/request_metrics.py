"""Counts HTTP requests as they begin and end."""

from __future__ import annotations

import time
from itertools import groupby

from amoe.metrics import EngineMetrics
from amoe.server.request_record import RequestRecord


class RequestMetrics:
    """An observer of `RequestScope`. It is told of beginnings and ends only: what is streamed costs nothing here."""

    def __init__(self, metrics: EngineMetrics) -> None:
        self._metrics = metrics

    def began(self, record: RequestRecord) -> None:
        """A request has come."""
        self._metrics.http.began()

    def ended(self, record: RequestRecord) -> None:
        """It is answered, or its client has gone."""
        seconds = time.monotonic() - record.began_s
        self._metrics.http.ended(record.handler, record.method, record.status or 0, seconds)
        pairs = zip(record.starts, record.generations, strict=True)
        for _, group in groupby(pairs, key=lambda pair: id(pair[0][0])):  # the choices of a prompt share its list
            generations = [generation for _, generation in group]
            longest = max(generation.state.num_generated_tokens for generation in generations)
            self._metrics.all_choices_finished(generations[0].rank, len(generations), longest)

"""OpenTelemetry, if asked for: one span per request, with its time in the queue, in prefill and in decode below it.

A span is made when its request has ended, with the times at which things happened, so that tracing costs a streamed
token nothing. Spans leave from a thread of their own; a collector that is down costs spans, and nothing else.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from amoe import __version__
from amoe.errors import ConfigError
from amoe.server.access_log import PROBES
from amoe.server.request_record import RequestRecord

INSTALL_HINT = "tracing needs OpenTelemetry: pip install 'amoe[tracing]'"
EXPORT_TIMEOUT_S = 5.0


def check_tracing(endpoint: str) -> None:
    """Before the model is loaded.

    Raises:
        ConfigError: OpenTelemetry is not installed, or `endpoint` is no URL.
    """
    if not endpoint.startswith(("http://", "https://")):
        raise ConfigError(f"--otlp-traces-endpoint {endpoint!r} is not a URL such as http://host:4318/v1/traces")
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace.export  # noqa: F401 - whether it is there
    except ImportError as error:
        raise ConfigError(INSTALL_HINT) from error


class Tracer:
    """Makes the spans of each request that asks for something. An observer of `RequestScope`.

    Args:
        endpoint: URL that takes OTLP traces over HTTP, as in `http://collector:4318/v1/traces`.

    Raises:
        ConfigError: OpenTelemetry is not installed, or `endpoint` is no URL.
    """

    def __init__(self, endpoint: str) -> None:
        check_tracing(endpoint)
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        logging.getLogger("opentelemetry").setLevel(logging.ERROR)  # each failed attempt would be a warning
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S)
        resource = Resource.create({"service.name": "amoe", "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("amoe", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._trace = trace

    def began(self, record: RequestRecord) -> None:
        """Nothing yet."""

    def ended(self, record: RequestRecord) -> None:
        """Hand its spans to the exporting thread."""
        if record.method != "POST" or record.path in PROBES:
            return
        parent = self._propagator.extract(record.headers)
        span = self._tracer.start_span(
            record.method
            if record.handler is None
            else f"{record.method} {record.handler}",  # few names, as for series
            context=parent,
            kind=self._trace.SpanKind.SERVER,
            start_time=record.began_ns,
            attributes=span_attributes(record),
        )
        if record.status is None or record.status >= 500:
            span.set_status(self._trace.StatusCode.ERROR)
        below = self._trace.set_span_in_context(span)
        for name, start_s, end_s in phases(record):
            child = self._tracer.start_span(name, context=below, start_time=_unix_ns(record, start_s))
            child.end(end_time=_unix_ns(record, end_s))
        span.end(end_time=_unix_ns(record, time.monotonic()))

    def close(self) -> None:
        """Send what is left, if anybody listens. Blocks for some seconds at most."""
        self._provider.force_flush(int(EXPORT_TIMEOUT_S * 1000))
        self._provider.shutdown()


def _unix_ns(record: RequestRecord, at_s: float) -> int:
    """A moment of the monotonic clock as Unix time, by the two times of the request's beginning."""
    return record.began_ns + round((at_s - record.began_s) * 1e9)


def phases(record: RequestRecord) -> list[tuple[str, float, float]]:
    """Name, start and end (monotonic) of what the first choice of a request has gone through."""
    if not record.generations:
        return []
    generation = record.generations[0]
    arrived, first = generation.arrived_at, generation.first_token_at
    spans = []
    if generation.queue_s is not None:
        scheduled = arrived + generation.queue_s
        spans.append(("queue", arrived, scheduled))
        if first is not None:
            spans.append(("prefill", scheduled, max(scheduled, first)))
    if first is not None:
        spans.append(("decode", first, max(first, generation.last_token_at)))
    return spans


def span_attributes(record: RequestRecord) -> dict[str, Any]:
    """OpenTelemetry's names for HTTP and generative AI; no prompt, no answer, no key."""
    attributes: dict[str, Any] = {
        "http.request.method": record.method,
        "url.path": record.path,
        "amoe.request_id": record.request_id,
        "gen_ai.provider.name": "amoe",
    }
    if record.handler is not None:
        attributes["http.route"] = record.handler
    if record.status is not None:
        attributes["http.response.status_code"] = record.status
    if record.generations:
        params = record.starts[0][1]
        attributes |= {
            "gen_ai.operation.name": "text_completion" if record.path == "/v1/completions" else "chat",
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.choice.count": len(record.generations),
            "gen_ai.usage.input_tokens": record.num_prompt_tokens,
            "gen_ai.usage.output_tokens": record.num_generated_tokens,
            "gen_ai.response.finish_reasons": record.finish_reasons,
        }
        if record.model is not None:
            attributes["gen_ai.request.model"] = attributes["gen_ai.response.model"] = record.model
        if record.ttft_s is not None:
            attributes["gen_ai.latency.time_to_first_token"] = record.ttft_s
    return attributes

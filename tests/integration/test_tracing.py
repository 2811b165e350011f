"""Spans on their way to a collector over OTLP/HTTP: a real exporter, a small collector, fake workers."""

from __future__ import annotations

import builtins
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from amoe.cluster.process import DEFAULT_ENTRY
from amoe.config import EngineConfig
from amoe.engine.async_engine import AsyncEngine
from amoe.errors import ConfigError
from amoe.logs import LogOptions
from amoe.server.app import create_app
from amoe.server.context import ServerContext
from amoe.server.options import ServerOptions
from amoe.server.run import _serve
from amoe.server.tracing import Tracer
from tests.fake_workers import make_engine, make_tokenizer

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """Takes spans and remembers them."""

    def __init__(self) -> None:
        self.spans: list[Any] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler) -> None:
                body = handler.rfile.read(int(handler.headers["content-length"]))
                if handler.headers.get("content-encoding") == "gzip":
                    import gzip

                    body = gzip.decompress(body)
                request = ExportTraceServiceRequest.FromString(body)
                for resource in request.resource_spans:
                    for scope in resource.scope_spans:
                        self.spans += scope.spans
                handler.send_response(200)
                handler.end_headers()

            def log_message(handler, *_: Any) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    made, (worker,) = make_engine(make_tokenizer(tmp_path / "tokenizer"))
    yield made
    await made.close()
    worker.die()


def client_of(engine: AsyncEngine, tracer: Tracer) -> httpx.AsyncClient:
    app = create_app(ServerContext(engine=engine, model_names=("fake",)), observers=[tracer])
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://test")


def attributes_of(span: Any) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        return [plain(item) for item in value.array_value.values] if kind == "array_value" else getattr(value, kind)

    return {item.key: plain(item.value) for item in span.attributes}


async def test_a_span_per_request_with_its_phases(collector: Collector, engine: AsyncEngine):
    tracer = Tracer(collector.url)
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "x-request-id": "r1"}
    async with client_of(engine, tracer) as http:
        for stream in (False, True):
            body = {"prompt": "abc", "max_tokens": 4, "temperature": 0.5, "stream": stream}
            assert (await http.post("/v1/completions", json=body, headers=headers)).status_code == 200
        assert (await http.post("/v1/completions", json={"prompt": 5})).status_code == 400
        assert (await http.get("/v1/models")).status_code == 200
    tracer.close()
    roots = [span for span in collector.spans if span.name.startswith("POST")]
    assert len(roots) == 3
    for root in roots[:2]:
        assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE_ID, PARENT_ID)
        attributes = attributes_of(root)
        assert attributes["gen_ai.request.model"] == "fake"
        assert attributes["gen_ai.usage.output_tokens"] == 4
        assert attributes["gen_ai.usage.input_tokens"] == len(engine.tokenizer.encode("abc"))
        assert attributes["gen_ai.request.temperature"] == 0.5
        assert attributes["gen_ai.request.max_tokens"] == 4
        assert attributes["gen_ai.response.finish_reasons"] == ["length"]
        assert (attributes["http.response.status_code"], attributes["amoe.request_id"]) == (200, "r1")
        assert attributes["http.route"] == "/v1/completions"
        children = [span for span in collector.spans if span.parent_span_id == root.span_id]
        assert "decode" in {child.name for child in children}
        assert {child.name for child in children} <= {"queue", "prefill", "decode"}
        for child in children:
            assert root.start_time_unix_nano <= child.start_time_unix_nano <= child.end_time_unix_nano
            assert child.end_time_unix_nano <= root.end_time_unix_nano
    assert attributes_of(roots[2])["http.response.status_code"] == 400
    assert roots[2].trace_id.hex() != TRACE_ID


async def test_a_dead_collector_costs_nothing(engine: AsyncEngine):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    tracer = Tracer(f"http://127.0.0.1:{port}/v1/traces")
    async with client_of(engine, tracer) as http:
        for _ in range(20):
            assert (await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})).status_code == 200
    tracer.close()  # returns, after some seconds at most: pytest's own limit holds it to that


def test_without_opentelemetry(monkeypatch):
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"pip install 'amoe\[tracing\]'"):
        Tracer("http://127.0.0.1:1/v1/traces")
    with pytest.raises(ConfigError, match="--otlp-traces-endpoint"):
        Tracer("collector:4318")


async def test_a_wrong_endpoint_is_found_before_the_model_is_looked_at(tmp_path: Path):
    (tmp_path / "config.json").write_text("no JSON")
    options = ServerOptions(model_names=("m",), port=0, otlp_traces_endpoint="collector:4318")
    with pytest.raises(ConfigError, match="--otlp-traces-endpoint"):
        await _serve(EngineConfig(model=str(tmp_path)), options, LogOptions(), DEFAULT_ENTRY)


async def test_spans_have_few_names(collector: Collector, engine: AsyncEngine):
    tracer = Tracer(collector.url)
    async with client_of(engine, tracer) as http:
        for path in ("/v1/responses/resp-1/cancel", "/nowhere/1"):
            assert (await http.post(path)).status_code == 404
    tracer.close()
    assert {span.name for span in collector.spans} == {"POST /v1/responses/{response_id}/cancel", "POST"}

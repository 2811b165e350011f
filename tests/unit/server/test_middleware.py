"""What requests pass on their way: keys, origins, bodies, ids, the last resort, the lines in the log."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from amoe.errors import ConfigError
from amoe.server.app import create_app
from amoe.server.context import ServerContext
from amoe.server.middleware.auth import is_known, presented_key
from amoe.server.options import CorsOptions, HttpOptions, ServerOptions, digest_keys
from tests.unit.server.conftest import Harness, assert_error, events

KEYS = digest_keys(("correct horse".replace(" ", "-"), "schlüssel"), "test")
BEARER = {"authorization": "Bearer correct-horse"}


async def client_of(server: Harness, options: HttpOptions) -> httpx.AsyncClient:
    """A client of another application over the same engine."""
    app = create_app(ServerContext(engine=server.engine, model_names=("fake",)), options)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://test")


@pytest.fixture
async def guarded(server: Harness) -> AsyncIterator[httpx.AsyncClient]:
    cors = CorsOptions(origins=("https://chat.example",))
    async with await client_of(server, HttpOptions(key_digests=KEYS, cors=cors)) as http:
        yield http


class TestKeys:
    async def test_everything_is_guarded_but_probes(self, guarded: httpx.AsyncClient):
        for path in ("/health", "/ping", "/metrics", "/version"):
            assert (await guarded.get(path)).status_code == 200
        for path in ("/", "/v1/models", "/v1/nothing", "/openapi.json", "/docs", "/load", "/live", "//health"):
            response = await guarded.get(path)
            assert_error(response, 401)
            assert response.headers["www-authenticate"].startswith("Bearer")
            assert response.headers["x-request-id"]
        assert_error(await guarded.post("/v1/completions", json={"prompt": "a"}), 401)

    @pytest.mark.parametrize(
        "headers",
        [
            BEARER,
            {"authorization": "bearer  correct-horse "},
            {"x-api-key": "correct-horse"},
            {"authorization": "Bearer schlüssel".encode()},
            {"authorization": "Basic " + base64.b64encode(b"anybody:correct-horse").decode()},
        ],
    )
    async def test_each_way_to_bring_a_key(self, guarded: httpx.AsyncClient, headers):
        assert (await guarded.get("/v1/models", headers=headers)).status_code == 200

    @pytest.mark.parametrize(
        "value",
        ["", "Bearer", "Bearer ", "Bearer correct", "Bearer correct-horse2", "Basic ????", "Basic YQ==", b"\xff"],
    )
    async def test_wrong_keys(self, guarded: httpx.AsyncClient, value):
        response = await guarded.get("/v1/models", headers={"authorization": value})
        assert "correct" not in assert_error(response, 401)

    async def test_a_browser_is_asked_for_a_password(self, guarded: httpx.AsyncClient):
        response = await guarded.get("/", headers={"accept": "text/html,*/*"})
        assert response.status_code == 401
        assert response.headers["www-authenticate"].startswith("Basic")
        assert "API key" in response.text

    @pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
    async def test_a_strangers_page_cannot_use_the_browsers_login(self, guarded: httpx.AsyncClient, kind: str | None):
        """A browser sends these without asking the server first, and its stored password along."""
        login = {"authorization": "Basic " + base64.b64encode(b"anybody:correct-horse").decode()}
        headers = login if kind is None else {**login, "content-type": kind}
        messages = b'[{"role": "user", "content": "a"}]'
        body = b'{"prompt": "a", "input": "a", "tokens": [1], "max_tokens": 1, "messages": %b}' % messages
        for path in (
            *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"),
            *("/tokenize", "/v1/tokenize", "/detokenize", "/v1/detokenize"),
        ):
            response = await guarded.post(path, content=body, headers=headers)
            assert response.status_code == 400, path
            assert "application/json" in response.json()["error"]["message"]

    def test_keys_are_kept_nowhere(self):
        options = HttpOptions(key_digests=digest_keys(("secret-key",), "test"))
        assert "secret" not in repr(options)
        assert is_known(b"secret-key", options.key_digests)
        assert presented_key({}) is None

    @pytest.mark.parametrize("key", ["", "two words", "line\nend"])
    def test_keys_that_no_header_can_carry(self, key):
        with pytest.raises(ConfigError, match="--api-key") as caught:
            digest_keys((key,), "--api-key")
        assert not key or key not in str(caught.value)


class TestOrigins:
    async def test_a_preflight_needs_no_key(self, guarded: httpx.AsyncClient):
        headers = {"origin": "https://chat.example", "access-control-request-method": "POST"}
        headers["access-control-request-headers"] = "authorization,content-type"
        response = await guarded.options("/v1/completions", headers=headers)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://chat.example"
        response = await guarded.get("/v1/models", headers={"origin": "https://chat.example"})
        assert_error(response, 401)
        assert response.headers["access-control-allow-origin"] == "https://chat.example"

    async def test_other_origins_stay_outside(self, guarded: httpx.AsyncClient):
        headers = {"origin": "https://evil.example", "access-control-request-method": "POST"}
        assert (await guarded.options("/v1/completions", headers=headers)).status_code == 400
        response = await guarded.get("/v1/models", headers=BEARER | {"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in response.headers

    async def test_closed_by_default(self, server: Harness):
        response = await server.http.get("/v1/models", headers={"origin": "https://chat.example"})
        assert "access-control-allow-origin" not in response.headers

    @pytest.mark.parametrize(
        "options",
        [{"origins": ("chat.example",)}, {"origins": ("*",), "credentials": True}, {"origins": ("http://a/b",)}],
    )
    def test_origins_that_cannot_work(self, options):
        with pytest.raises(ConfigError, match="--allow"):
            CorsOptions(**options)


class TestIds:
    async def test_the_clients_own_is_in_header_and_body(self, server: Harness):
        headers = {"x-request-id": "abc-123"}
        response = await server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers=headers)
        assert response.headers["x-request-id"] == "abc-123"
        assert response.json()["id"] == "cmpl-abc-123"
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "stream": True}
        response = await server.http.post("/v1/chat/completions", json=body, headers=headers)
        assert {chunk["id"] for chunk in events(response)} == {"chatcmpl-abc-123"}

    @pytest.mark.parametrize("bad", ["", "x" * 257, "two words", "line\tend", "ümlaut".encode()])
    async def test_what_does_not_belong_into_a_log_is_replaced(self, server: Harness, bad):
        response = await server.http.get("/v1/models", headers={"x-request-id": bad})
        assert len(response.headers["x-request-id"]) == 32

    async def test_each_request_has_its_own(self, server: Harness):
        ids = {(await server.complete(prompt="a", max_tokens=1)).headers["x-request-id"] for _ in range(3)}
        assert len(ids) == 3


async def call(app: Any, receive: Any, headers: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """POST /v1/completions at the level of ASGI; what the application sent."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), *raw],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    await app(scope, receive, send)
    return sent


async def test_a_body_that_stalls_is_given_up(server: Harness):
    context = ServerContext(engine=server.engine, model_names=("fake",))
    app = create_app(context, HttpOptions(body_timeout_s=0.05))
    parts = [{"type": "http.request", "body": b'{"prompt": "a', "more_body": True}]

    async def receive() -> dict[str, Any]:
        if parts:
            return parts.pop()
        await asyncio.Event().wait()
        raise AssertionError

    start, _ = await call(app, receive)
    assert start["status"] == 408
    assert (b"connection", b"close") in start["headers"]
    assert not server.worker.requests


async def test_a_client_that_goes_away_in_the_middle_of_its_body(server: Harness):
    parts = [{"type": "http.disconnect"}, {"type": "http.request", "body": b'{"prompt": "a', "more_body": True}]

    async def receive() -> dict[str, Any]:
        return parts.pop()

    await call(server.app, receive)
    assert not server.worker.requests


async def test_a_drained_server_sends_its_clients_elsewhere(server: Harness):
    server.engine.refuse_new()
    response = await server.complete(prompt="a")
    assert "shutting down" in assert_error(response, 503)
    assert response.headers["connection"] == "close"
    assert int(response.headers["retry-after-ms"]) == 1000 * int(response.headers["retry-after"])
    assert (await server.http.get("/health")).status_code == 200


async def test_load_counts_what_is_open(server: Harness):
    server.worker.runs.clear()
    task = asyncio.create_task(server.complete(prompt="a", n=2, max_tokens=1))
    await server.worker.has_open(2)
    server.worker.stats.num_running = 2
    server.worker.beat()
    await asyncio.sleep(0.01)
    load = (await server.http.get("/load")).json()
    assert load == {
        "server_load": 1,
        "num_sequences_open": 2,
        "num_requests_running": 2,
        "num_requests_waiting": 0,
    }
    server.worker.runs.set()
    await task
    assert (await server.http.get("/load")).json()["server_load"] == 0


def fields_of(caplog: pytest.LogCaptureFixture, message: str) -> list[dict[str, Any]]:
    return [record.fields for record in caplog.records if record.getMessage() == message]


class TestLines:
    async def test_one_at_the_end_of_each_request(self, server: Harness, caplog):
        caplog.set_level(logging.INFO, "amoe.request")
        await server.http.post(
            "/v1/completions", json={"prompt": "abc", "max_tokens": 4, "n": 2}, headers={"x-request-id": "r1"}
        )
        await server.complete(prompt="a", max_tokens=3, stream=True)
        await server.complete(prompt="a", max_tokens=-3)
        await server.http.get("/health")
        whole, stream, wrong = fields_of(caplog, "request ended")
        assert whole.pop("seconds") >= whole.pop("ttft_s") >= 0
        whole.pop("queue_s", None)
        assert whole == {
            "method": "POST",
            "path": "/v1/completions",
            "status": 200,
            "request_id": "r1",
            "prompt_tokens": len(server.ids("abc")),
            "generated_tokens": 8,
            "finish_reason": "length",
        }
        assert (stream["generated_tokens"], stream["finish_reason"], stream["status"]) == (3, "length", 200)
        assert (wrong["status"], "prompt_tokens" in wrong) == (400, False)

    @pytest.mark.parametrize(
        ("path", "body", "words"),
        [
            ("/v1/completions", {"prompt": "secret", "max_tokens": -3}, "max_tokens"),
            ("/v1/completions", {"prompt": ["secret", 5]}, "prompt"),
            ("/v1/completions", {"prompt": "secret", "model": "two\nlines" + "s" * 300}, "the model 'two"),
            ("/v1/messages", {"messages": [{"role": "user", "content": "secret"}]}, "max_tokens"),
            ("/v1/completions", {"prompt": "secret" * 20_000}, "the body is larger than"),
            ("/v1/nothing", {"prompt": "secret"}, "there is no route POST /v1/nothing"),
        ],
    )
    async def test_why_and_from_where_a_request_was_refused(self, server: Harness, caplog, path, body, words):
        caplog.set_level(logging.INFO, "amoe.request")
        assert (await server.post(path, body)).status_code >= 400
        (line,) = fields_of(caplog, "request ended")
        assert (line["client"], words in line["error"]) == ("127.0.0.1", True)
        assert "secret" not in line["error"]
        assert "\n" not in line["error"]
        assert len(line["error"]) <= 200

    @pytest.mark.parametrize("accept", ["text/html", "application/json"])
    async def test_a_missing_key_is_told(self, guarded: httpx.AsyncClient, caplog, accept):
        caplog.set_level(logging.INFO, "amoe.request")
        await guarded.get("/v1/models", headers={"accept": accept})
        assert fields_of(caplog, "request ended")[0]["error"].startswith("no API key")

    async def test_probes_are_told_to_whoever_wants_everything(self, server: Harness, caplog):
        caplog.set_level(logging.DEBUG, "amoe.request")
        await server.http.get("/health")
        assert fields_of(caplog, "request ended")[0]["path"] == "/health"

    async def test_admitted_requests_with_their_parameters_and_no_prompt(self, server: Harness, caplog):
        caplog.set_level(logging.INFO, "amoe.request")
        for max_log_len, prompts in ((0, None), (4, ["the "])):
            caplog.clear()
            options = HttpOptions(log_requests=True, max_log_len=max_log_len)
            async with await client_of(server, options) as http:
                body = {"prompt": "the secret", "max_tokens": 2, "temperature": 0.5, "cache_salt": "pepper"}
                assert (await http.post("/v1/completions", json=body)).status_code == 200
            (line,) = fields_of(caplog, "request admitted")
            assert (line["max_tokens"], line["temperature"], line["model"]) == (2, 0.5, "fake")
            assert line.get("prompts") == prompts
            assert "pepper" not in str(line) and "secret" not in str(line)


async def test_a_bug_is_answered_with_the_id_under_which_it_is_logged(server: Harness, monkeypatch, caplog):
    def explode(*args: Any, **more: Any) -> None:
        raise KeyError("secret")

    monkeypatch.setattr(server.engine, "start", explode)
    response = await server.http.post("/v1/completions", json={"prompt": "a"}, headers={"x-request-id": "r2"})
    assert "secret" not in assert_error(response, 500)
    assert response.headers["x-request-id"] == "r2"
    assert [record.exc_info is not None for record in caplog.records if record.levelno == logging.ERROR] == [True]


@pytest.mark.parametrize(
    ("wrong", "flag"),
    [
        ({"model_names": ()}, "--served-model-name"),
        ({"ssl_keyfile": "k"}, "--ssl-certfile"),
        ({"stall_timeout_s": 0.5}, "--stall-timeout"),
        ({"heartbeat_timeout_s": 3.0}, "--heartbeat-timeout"),
    ],
)
def test_options_that_cannot_work(wrong, flag):
    with pytest.raises(ConfigError, match=flag):
        replace(ServerOptions(model_names=("m",)), **wrong)


@pytest.mark.parametrize(("max_model_len", "limit"), [(64, 2**20), (131_072, 2**24)])
def test_the_longest_body_follows_the_context(max_model_len: int, limit: int) -> None:
    assert HttpOptions().body_limit(max_model_len) == limit
    assert HttpOptions(max_body_bytes=7).body_limit(max_model_len) == 7

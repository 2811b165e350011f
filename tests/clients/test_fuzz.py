"""Two thousand malformed requests: a clear 4xx for each, no traceback anywhere, and the engine serves the next one."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.served import ServedModel

NUM_BODIES, NUM_HEADERS, NUM_BROKEN = 1200, 500, 300
ROUTES = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
)
VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    "/v1/responses": {"input": "a", "max_output_tokens": 2},
    "/v1/messages": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "a"}]},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1, 2]},
}
# What no field of any request may be.
WRONG: tuple[Any, ...] = (
    {"a": {"b": [1, {}]}},
    [[[]]],
    -(10**30),
    1e308,
    "\ud800",
    "x" * 5000,
    [None],
    {"": None},
    [{}] * 50,
    "\x00",
    [[1, 2], "a", None],
    {"type": 7},
    -1.5,
)


@pytest.fixture(scope="module")
def served() -> Iterator[ServedModel]:
    with ServedModel("--max-model-len", "128", "--max-num-seqs", "8") as server:
        yield server


@pytest.fixture(scope="module")
def fields(served: ServedModel) -> dict[str, list[str]]:
    """Names of the fields of each route's request, by its own description."""
    described = httpx.get(f"{served.url}/openapi.json", timeout=60).json()
    names = {}
    for route in ROUTES:
        schema = described["paths"][route]["post"]["requestBody"]["content"]["application/json"]["schema"]
        variants = [schema, *schema.get("anyOf", []), *schema.get("oneOf", [])]
        found: set[str] = set()
        for variant in variants:
            if "$ref" in variant:
                variant = described["components"]["schemas"][variant["$ref"].rpartition("/")[2]]
            found |= set(variant.get("properties", {}))
        assert found, f"{route} describes no field"
        names[route] = sorted(found)
    return names


def broken_json(draw: random.Random, route: str) -> bytes:
    body = json.dumps(VALID[route]).encode()
    kinds: tuple[Callable[[], bytes], ...] = (
        lambda: body[: draw.randrange(1, len(body))],
        lambda: body.replace(b":", b"", 1),
        lambda: draw.randbytes(draw.randrange(1, 200)),
        lambda: b"[" * draw.randrange(1, 5000),
        lambda: b'{"a":' * draw.randrange(1, 5000),
        lambda: b"\xff\xfe" + body,
        lambda: b"null",
        lambda: b'"text"',
        lambda: b"",
        lambda: b"[]",
        lambda: b"NaN",
        lambda: body[:-1] + b', "temperature": NaN}',
    )
    return draw.choice(kinds)()


def wrong_field(draw: random.Random, route: str, names: list[str]) -> bytes:
    return json.dumps({**VALID[route], draw.choice(names): draw.choice(WRONG)}).encode()


def check(answer: httpx.Response, sent: object) -> None:
    """An answer to a malformed request. Some values happen to be right for some field: 200 is no crime."""
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, (sent, answer.status_code, answer.text)
    assert "Traceback" not in answer.text and "/site-packages/" not in answer.text, (sent, answer.text)
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert error["message"], (sent, answer.text)


def test_malformed_bodies(served: ServedModel, fields: dict[str, list[str]]) -> None:
    draw = random.Random(1)
    refused = 0
    with httpx.Client(base_url=served.url, timeout=60) as client:
        for index in range(NUM_BODIES):
            route = draw.choice(ROUTES)
            body = broken_json(draw, route) if index % 3 == 0 else wrong_field(draw, route, fields[route])
            answer = client.post(route, content=body, headers={"content-type": "application/json"})
            check(answer, (route, body[:200]))
            refused += answer.status_code != 200
    assert refused > NUM_BODIES / 2, "most of these are wrong"
    assert served.works()


HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (b"Content-Type", b"text/plain"),
    (b"Content-Type", b"application/json; charset=utf-99"),
    (b"Content-Type", b"multipart/form-data; boundary=x"),
    (b"Content-Type", b"\xff\xfe"),
    (b"Content-Encoding", b"gzip"),
    (b"Authorization", b"Bearer \xe4\xf6\xfc"),
    (b"Authorization", b"Basic !!!"),
    (b"X-Request-Id", b"\xc3\xa4\x01"),
    (b"X-Request-Id", b"x" * 2000),
    (b"Accept", b"\x7f"),
    (b"Origin", b"null"),
    (b"traceparent", b"00-zz-zz-zz"),
    (b"Expect", b"200-nonsense"),
    (b"Transfer-Encoding", b"gzip"),
    (b"Content-Length", b"-5"),
    (b"Content-Length", b"999999999999999999999"),
    (b"Content-Length", b"1e3"),
    (b"Host", b"\x00"),
    (b"Connection", b"upgrade"),
    (b"Upgrade", b"websocket"),
)


def raw(served: ServedModel, data: bytes, *, half_close: bool) -> bytes:
    """What the server says to these bytes, up to its closing or a second of silence."""
    host, _, port = served.url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=1.0) as connection:
        answer = b""
        try:
            connection.sendall(data)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            while len(answer) < 1 << 16 and (part := connection.recv(1 << 16)):
                answer += part
                if b"\r\n\r\n" in answer:
                    break
        except (TimeoutError, ConnectionError):
            pass
        return answer


def status_of(answer: bytes) -> int | None:
    """None: the server has closed without a word."""
    if not answer:
        return None
    assert answer.startswith(b"HTTP/1.1 "), answer[:100]
    return int(answer.split(b" ", 2)[1])


def test_malformed_headers(served: ServedModel) -> None:
    draw = random.Random(2)
    for _ in range(NUM_HEADERS):
        route = draw.choice(ROUTES)
        body = json.dumps(VALID[route]).encode()
        chosen = dict(draw.sample(HEADERS, draw.randrange(1, 4)))
        chosen.setdefault(b"Content-Length", str(len(body)).encode())
        chosen.setdefault(b"Content-Type", b"application/json")
        lines = b"".join(name + b": " + value + b"\r\n" for name, value in chosen.items())
        # Half closed: whoever announces more than comes says so by ending, and needs no timeout.
        answer = raw(served, f"POST {route} HTTP/1.1\r\n".encode() + lines + b"\r\n" + body, half_close=True)
        status = status_of(answer)
        assert status is None or status == 200 or 400 <= status < 500, (chosen, answer[:300])
    assert served.works()


def test_broken_and_half_closed_streams(served: ServedModel) -> None:
    draw = random.Random(3)
    for _ in range(NUM_BROKEN):
        route = draw.choice(ROUTES)
        body = json.dumps({**VALID[route], "stream": True}).encode()
        head = f"POST {route} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
        whole = head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
        kinds: tuple[Callable[[], bytes], ...] = (
            lambda whole=whole: whole[: draw.randrange(1, len(whole))],
            lambda whole=whole: whole,
            lambda head=head: head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
            lambda head=head: head + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab",
            lambda: draw.randbytes(draw.randrange(1, 300)),
            lambda whole=whole: whole.replace(b"HTTP/1.1", b"HTTP/9.9"),
            lambda whole=whole: whole.replace(b"POST", b"P\x00ST"),
            lambda whole=whole: whole.replace(b"\r\n", b"\n"),
            lambda whole=whole: whole.replace(b"POST ", b"GET "),
        )
        answer = raw(served, draw.choice(kinds)(), half_close=draw.random() < 0.7)
        status = status_of(answer)
        assert status is None or status == 200 or 400 <= status < 500, answer[:300]
    assert served.works()


def test_nothing_is_left_open(served: ServedModel) -> None:
    assert httpx.get(f"{served.url}/health", timeout=60).status_code == 200
    assert not served.tracebacks(), served.tracebacks()

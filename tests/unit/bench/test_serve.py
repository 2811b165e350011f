"""`amoe bench serve` against a fake server: timings, counts, and every way to fail."""

import argparse
import asyncio
import json

import httpx
import pytest

from amoe.bench import cli, serve
from amoe.bench.client import ServerClient
from amoe.bench.record import RequestRecord, summarise
from amoe.bench.workload import RequestSpec
from amoe.clock import ManualClock
from amoe.errors import AmoeError, ConfigError
from tests.unit.bench.fake_server import DONE, FakeServer, Pieces, event


@pytest.fixture
def clock():
    return ManualClock()


async def ask(clock, pieces, status=200):
    """The record of one request that is answered by `pieces`."""
    server = FakeServer(lambda body: httpx.Response(status, stream=Pieces(clock, pieces)))
    record = RequestRecord(clock.now(), requested_tokens=3)
    async with serve.http_client("http://fake/v1/", 5.0, server.transport()) as http:
        client = ServerClient(http, clock, model="fake", body={"temperature": 0.0})
        await client.send(RequestSpec(prompt=[1, 2], max_tokens=3), record)
    record.finished_at = clock.now()
    assert server.requests[0]["prompt"] == [1, 2]
    assert server.requests[0]["max_tokens"] == 3
    assert server.requests[0]["stream_options"]["include_usage"] is True
    return record


async def test_pieces_are_timed_and_tokens_counted(clock):
    pieces = [
        (0.5, event("a", tokens=1)),
        (0.25, event("", tokens=1)),  # no new token
        (0.25, event("bc", tokens=3)[:20]),  # a piece of the network need not be one of the stream
        (0.0, event("bc", tokens=3)[20:]),
        (1.0, event("", tokens=4, finish="length")),
        (0.0, event(choices=False, tokens=4)),
        (0.0, DONE),
    ]
    record = await ask(clock, pieces)
    assert record.failure is None
    assert record.arrivals == [0.5, 1.0, 2.0]
    assert record.tokens == [1, 2, 1]
    assert (record.prompt_tokens, record.output_tokens) == (7, 4)


async def test_without_continuous_usage_pieces_with_text_are_tokens(clock):
    pieces = [
        (1.0, event("a")),
        (1.0, event("b")),
        (0.0, event("", finish="stop")),
        (0.0, event(choices=False, tokens=2)),
        (0.0, DONE),
    ]
    record = await ask(clock, pieces)
    assert record.failure is None
    assert record.tokens == [1, 1]
    assert record.output_tokens == 2


@pytest.mark.parametrize(
    ("pieces", "failure"),
    [
        ([(0, event("a", tokens=1)), (0, httpx.ReadError("gone"))], "ReadError"),
        ([(0, event("a", tokens=1)), (0, httpx.ReadTimeout("slow"))], "ReadTimeout"),
        ([(0, event("a", tokens=1))], "the stream broke off"),
        ([(0, event("a", tokens=1)), (0, DONE)], "the stream ended without a finish_reason"),
        ([(0, b"data: {oops\n\n")], "an event of the stream is not JSON"),
        ([(0, b'data: {"error": {"message": "worker died"}}\n\n')], "error in the stream: worker died"),
    ],
)
async def test_failing_streams(clock, pieces, failure):
    assert (await ask(clock, pieces)).failure == failure


@pytest.mark.parametrize(
    ("body", "failure"),
    [
        (b'{"error": {"message": "the queue is full"}}', "HTTP 503: the queue is full"),
        (b"<html>bad gateway</html>", "HTTP 503: <html>bad gateway</html>"),
        (b"x" * 500, "HTTP 503: " + "x" * 120),
    ],
)
async def test_refusals(clock, body, failure):
    assert (await ask(clock, [(0, body)], status=503)).failure == failure


async def test_a_server_that_is_not_there():
    def refuse(request):
        raise httpx.ConnectError("refused")

    async with serve.http_client("http://fake", 5.0, httpx.MockTransport(refuse)) as http:
        with pytest.raises(AmoeError, match="http://fake/v1/models"):
            await serve.choose_model(http, None)


async def test_models():
    async with serve.http_client("http://fake", 5.0, FakeServer(None).transport()) as http:
        assert (await serve.choose_model(http, None))["id"] == "fake"
        assert (await serve.choose_model(http, "fake"))["id"] == "fake"
        with pytest.raises(ConfigError, match="other"):
            await serve.choose_model(http, "other")


def whole_answer(body):
    count = body["max_tokens"]
    pieces = [(0.0, event("x", tokens=i + 1)) for i in range(count - 1)]
    pieces += [(0.0, event("x", tokens=count, finish="length")), (0.0, event(choices=False, tokens=count)), (0.0, DONE)]
    return httpx.Response(200, stream=Pieces(ManualClock(), pieces))


@pytest.fixture
def run(monkeypatch):
    """Run `amoe bench serve` with these flags against a fake server."""

    real = serve.http_client

    def run(server, *flags):
        parser = argparse.ArgumentParser()
        cli.add_parser(parser.add_subparsers(dest="command"))
        args = parser.parse_args(["bench", "serve", *flags])
        monkeypatch.setattr(serve, "http_client", lambda url, timeout: real(url, timeout, server.transport()))
        return args.func(args)

    return run


@pytest.mark.parametrize("load", [("--concurrency", "3"), ("--request-rate", "1000")])
def test_a_run_from_flags_to_json(run, tmp_path, capsys, load):
    server = FakeServer(whole_answer)
    path = tmp_path / "out.json"
    flags = ["--num-prompts", "9", "--input-len", "8", "--output-len", "4", "--range-ratio", "0.5", "--warmup", "2"]
    assert run(server, *flags, *load, "--json", str(path)) == 0
    assert len(server.requests) == 11
    assert all(4 <= len(r["prompt"]) <= 12 and max(r["prompt"]) < 4096 for r in server.requests)
    assert all(r["ignore_eos"] for r in server.requests)
    report = json.loads(path.read_text())
    assert report["results"]["completed"] == 9
    assert report["results"]["output_tokens"] == sum(r["max_tokens"] for r in server.requests[2:])
    assert report["config"]["num_prompts"] == 9
    assert {"amoe_version", "date", "benchmark"} <= set(report)
    out = capsys.readouterr()
    assert "9 completed, 0 failed" in out.out
    assert "requests: 9/9" in out.err


def test_failures_are_shown_and_set_the_exit_status(run, capsys):
    def answer(body):
        full = len(server.requests) % 2
        return httpx.Response(503, json={"error": {"message": "full"}}) if full else whole_answer(body)

    server = FakeServer(answer)
    assert run(server, "--num-prompts", "6", "--input-len", "4", "--output-len", "2", "--warmup", "0") == 1
    assert "3 × failed: HTTP 503: full" in capsys.readouterr().out


def test_lengths_that_the_model_cannot_hold_are_refused(run):
    server = FakeServer(whole_answer)
    with pytest.raises(ConfigError, match="limit is 64"):
        run(server, "--input-len", "40", "--output-len", "40")
    assert server.requests == []


def test_wrong_flags_are_a_message(run):
    with pytest.raises(ConfigError, match="--request-rate"):
        run(FakeServer(whole_answer), "--request-rate", "0", "--input-len", "4", "--output-len", "4")
    with pytest.raises(ConfigError, match="--range-ratio"):
        run(FakeServer(whole_answer), "--range-ratio", "2")


async def test_an_interrupted_run_shows_what_it_has():
    clock = ManualClock()
    answered = asyncio.Event()

    def answer(body):
        if len(server.requests) <= 2:
            return whole_answer(body)
        answered.set()
        return httpx.Response(200, stream=Endless())

    class Endless(httpx.AsyncByteStream):
        async def __aiter__(self):
            yield event("x", tokens=1)
            await asyncio.Event().wait()

    server = FakeServer(answer)
    plan = serve.ServePlan(
        warmup=[],
        specs=[RequestSpec(prompt=[1], max_tokens=2)] * 9,
        arrivals=(),
        concurrency=1,
        body={},
    )
    async with serve.http_client("http://fake", 5.0, server.transport()) as http:
        task = asyncio.create_task(serve.measure(http, "fake", plan, clock, NoProgress()))
        await answered.wait()
        task.cancel()
        result = await task
    figures = summarise(result.records)
    assert result.interrupted
    assert (figures.completed, figures.failed, figures.interrupted) == (2, 0, 1)


class NoProgress:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def advance(self, record):
        pass

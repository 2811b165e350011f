"""The `openai` client against a real socket: what users' programs do.

The workers behind it repeat the prompt; `serving` may be given any other engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from amoe.server.app import create_app
from amoe.server.context import ServerContext
from amoe.server.options import ServerOptions
from amoe.server.web_server import WebServer
from tests.fake_workers import FakeWorker, make_engine, make_tokenizer


class Serving:
    """A server in a thread of its own.

    Attributes:
        url: its base.
        worker: behind it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._listening = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.worker: FakeWorker

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.engine, (self.worker,) = make_engine(self._directory, max_num_seqs=2, max_waiting=0)
        context = ServerContext(engine=self.engine, model_names=("fake",))
        options = ServerOptions(model_names=("fake",))
        self._server = WebServer(create_app(context), options)
        serving = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        await self._server.listening.wait()
        self._listening.set()
        await serving
        await self.engine.close()

    def __enter__(self) -> Serving:
        self._thread.start()
        self._listening.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._listener.close()

    def call(self, function) -> None:
        """Run `function` in the server's event loop, and wait."""

        async def run() -> None:
            function()

        asyncio.run_coroutine_threadsafe(run(), self._loop).result()

    def until_open(self, count: int) -> None:
        """Wait until the worker holds so many sequences."""
        asyncio.run_coroutine_threadsafe(self.worker.has_open(count), self._loop).result()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nobody gets a token within."""
        self.call(self.worker.runs.clear)
        try:
            yield
        finally:
            self.call(self.worker.runs.set)


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with Serving(make_tokenizer(tmp_path_factory.mktemp("tokenizer"))) as serving:
        yield serving


@pytest.fixture
def client(serving: Serving) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{serving.url}/v1", api_key="none", max_retries=0) as client:
        yield client
    serving.until_open(0)


def test_models(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").owned_by == "amoe"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope")


def test_completion(client: openai.OpenAI):
    result = client.completions.create(model="fake", prompt="ab", max_tokens=4, logprobs=1, extra_body={"top_k": 3})
    assert result.choices[0].text == "abab"
    assert result.choices[0].finish_reason == "length"
    assert result.choices[0].logprobs.tokens == ["a", "b", "a", "b"]
    assert result.usage.completion_tokens == 4
    assert result.usage.prompt_tokens_details.cached_tokens == 0


def test_completion_stream(client: openai.OpenAI):
    stream = client.completions.create(
        model="fake", prompt="ab", max_tokens=4, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "abab"
    assert chunks[-1].usage.total_tokens == 6


def test_chat(client: openai.OpenAI):
    result = client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "yo"}], max_tokens=4, logprobs=True, top_logprobs=2, n=2
    )
    assert [choice.message.content for choice in result.choices] == ["u:yo"] * 2
    assert result.choices[0].message.role == "assistant"
    assert len(result.choices[0].logprobs.content[0].top_logprobs) == 2


def test_chat_stream_helper(client: openai.OpenAI):
    with client.chat.completions.stream(
        model="fake", messages=[{"role": "user", "content": "yo"}], max_tokens=4, stop=["o"]
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "u:y"
    assert final.choices[0].finish_reason == "stop"


def test_bad_request(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="fake", prompt="ab", max_tokens=4, temperature=9e99, top_p=7)
    assert caught.value.param == "top_p"
    assert caught.value.status_code == 400


def test_full_queue_and_retry(serving: Serving, client: openai.OpenAI):
    with serving.paused():
        streams = [client.completions.create(model="fake", prompt="ab", max_tokens=2, stream=True) for _ in range(2)]
        serving.until_open(2)
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="fake", prompt="ab")
        assert caught.value.status_code == 503
        assert int(caught.value.response.headers["retry-after"]) >= 1
    assert ["".join(chunk.choices[0].text for chunk in stream) for stream in streams] == ["ab", "ab"]


def test_leaving_a_stream_frees_the_sequence(serving: Serving, client: openai.OpenAI):
    serving.call(lambda: setattr(serving.worker, "script", lambda request: [70] * request.params.max_tokens))
    with serving.paused():
        stream = client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "yo"}], max_tokens=40, stream=True
        )
        serving.until_open(1)
        stream.close()
        serving.until_open(0)


def test_leaving_without_a_stream_frees_the_sequence(serving: Serving):
    with serving.paused(), socket.create_connection(("127.0.0.1", int(serving.url.rsplit(":", 1)[1]))) as connection:
        body = b'{"prompt":"ab","max_tokens":40}'
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        serving.until_open(1)
        connection.close()
        serving.until_open(0)


def test_death_in_the_middle_of_a_stream(tmp_path: Path):
    with Serving(make_tokenizer(tmp_path)) as serving:
        client = openai.OpenAI(base_url=f"{serving.url}/v1", api_key="none", max_retries=0)
        with serving.paused():
            stream = client.completions.create(model="fake", prompt="ab", stream=True)
            serving.until_open(1)
            serving.call(serving.worker.die)
            with pytest.raises(openai.APIError, match="worker 0 has gone"):
                list(stream)
        assert httpx.get(f"{serving.url}/health", timeout=60).status_code == 503
        client.close()

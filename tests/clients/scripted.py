"""A server whose model understands what it is asked, for suites that judge answers: the small model does not.

Everything is real but the workers: these read the rendered conversation and look up what a sane model would say. What
they say has to fit the grammar of the request, if there is one.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llguidance
import llguidance.hf
import tokenizers

from amoe.engine.messages import AddRequest
from amoe.engine.tokenizer import Tokenizer
from amoe.server.app import create_app
from amoe.server.context import ServerContext
from amoe.server.options import ServerOptions
from amoe.server.web_server import WebServer
from tests.fake_workers import make_engine, make_tokenizer

# The whole conversation as JSON, for the script to read.
TEMPLATE = "{{ {'messages': messages, 'tools': tools} | tojson }}"

CALLS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("magic_function(3)", "magic_function", {"input": 3}),
    ("magic_function_no_args", "magic_function_no_args", {}),
    ("weather", "get_weather", {"location": "San Francisco, CA"}),
    ("Pirate", "greeting_generator", {"answer_style": "Pirate"}),
    ("你好啊集团", "unicode_customer", {"customer_name": "你好啊集团", "description": "科技公司"}),
    ("こんにちは", "unicode_customer", {"customer_name": "こんにちは株式会社", "description": "日本の会社"}),
    ("3 + 4", "my_adder_tool", {"a": 3, "b": 4}),
    ("Hello!", "magic_function", {"input": 1}),
)
JOKE = {"setup": "Why did the cat sit on the computer?", "punchline": "To keep an eye on the mouse."}


def answer(conversation: dict[str, Any], *, must_fit: bool) -> str:
    """What a sane model says."""
    last = conversation["messages"][-1]
    said = str(last["content"])
    if last["role"] == "tool":
        return "The tool says: " + said
    for words, name, arguments in CALLS:
        if words in said and any(tool["function"]["name"] == name for tool in conversation["tools"] or ()):
            return json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    if "joke about cats" in said or "setup to a joke" in said:
        if conversation["tools"]:  # a schema may come as a tool as well
            return json.dumps({"name": conversation["tools"][0]["function"]["name"], "arguments": JOKE})
        if must_fit:
            return json.dumps(JOKE, separators=(",", ":"))
    return "A sane answer to: " + said


class ScriptedServer:
    """A server in a thread of its own, within a `with` block."""

    def __init__(self, directory: Path) -> None:
        self._directory = make_tokenizer(directory, chat_template=TEMPLATE)
        self._tokenizer = Tokenizer(self._directory)
        hf = tokenizers.Tokenizer.from_file(str(self._directory / "tokenizer.json"))
        self._guide = llguidance.LLTokenizer(hf.to_str(), n_vocab=300, eos_token=0)
        self._listening = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.complaints: list[str] = []

    def _script(self, request: AddRequest) -> Sequence[int]:
        conversation = json.loads(self._tokenizer.decode(request.prompt_token_ids))
        grammar = request.params.grammar
        text = answer(conversation, must_fit=grammar is not None)
        ids = self._tokenizer.encode(text)
        if grammar is not None:
            matcher = llguidance.LLMatcher(self._guide, grammar)
            if not matcher.consume_tokens(ids) or not matcher.is_accepting():
                self.complaints.append(f"the grammar does not let pass: {text}\n{grammar}\n{matcher.get_error()}")
        return [*ids, 0]

    async def _serve(self) -> None:
        engine, (worker,) = make_engine(self._directory, max_num_seqs=8, max_waiting=8, max_model_len=20_000)
        worker.script = self._script
        context = ServerContext(engine=engine, model_names=("scripted",))
        self._server = WebServer(create_app(context), ServerOptions(model_names=("scripted",)))
        serving = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        await self._server.listening.wait()
        self._listening.set()
        await serving
        await engine.close()
        worker.die()

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        self._listening.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._listener.close()
        assert not self.complaints, self.complaints[0]

"""/tokenize, /detokenize and /tokenizer_info."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from amoe.engine.tokenizer import Tokenizer
from tests.fake_workers import CHAT_TEMPLATE, EOS, make_tokenizer
from tests.unit.server.conftest import Harness, assert_error

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize"])
async def test_a_text(server: Harness, path: str):
    ids = server.ids("the dog ☃")
    body = (await server.post(path, {"prompt": "the dog ☃"})).json()
    assert body == {"count": len(ids), "max_model_len": 64, "tokens": ids, "token_strs": None}
    body = (await server.post(path, {"model": "fake", "prompt": "the dog ☃", "return_token_strs": True})).json()
    assert body["token_strs"][-3:] == ["â", "ĺ", "ĥ"]
    assert len(body["token_strs"]) == body["count"]


async def test_an_empty_text_has_no_tokens(server: Harness):
    assert (await server.post("/tokenize", {"prompt": ""})).json()["tokens"] == []


async def test_a_conversation_as_its_completion_sees_it(server: Harness):
    tokens = (await server.post("/tokenize", {"messages": MESSAGES})).json()["tokens"]
    assert tokens == server.ids("u:hi|a:")
    assert (await server.chat(messages=MESSAGES, max_tokens=1)).status_code == 200
    assert server.worker.requests[-1].prompt_token_ids == tokens
    body = {"messages": MESSAGES, "add_generation_prompt": False}
    assert (await server.post("/tokenize", body)).json()["tokens"] == server.ids("u:hi|")


@pytest.mark.parametrize("path", ["/detokenize", "/v1/detokenize"])
async def test_back_to_text(server: Harness, path: str):
    tokens = [*server.ids("the dog ☃"), 0]
    assert (await server.post(path, {"tokens": tokens})).json() == {"prompt": "the dog ☃" + EOS}
    assert (await server.post(path, {"tokens": []})).json() == {"prompt": ""}
    many = server.ids("dog ") * 2000
    assert (await server.post(path, {"tokens": many})).json() == {"prompt": "dog " * 2000}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}], "prompt": "a"}, "prompt"),
        ("/tokenize", {"messages": None}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages.0.content"),
        ("/tokenize", {"messages": [{"role": "nobody", "content": ""}]}, "messages.0.role"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [300]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        ("/detokenize", {"tokens": [1, "x"]}, "tokens.1"),
    ],
)
async def test_wrong_fields_are_named(server: Harness, path: str, body: dict, param: str):
    assert_error(await server.post(path, body), 400, param)


async def test_other_models_are_not_known(server: Harness):
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        assert_error(await server.post(path, {"model": "other", **body}), 404, "model")


async def test_what_is_known_of_the_tokenizer(server: Harness):
    body = (await server.http.get("/tokenizer_info")).json()
    assert body == {"eos_token": EOS, "chat_template": CHAT_TEMPLATE}


def test_no_path_of_this_machine_is_told(tmp_path: Path):
    make_tokenizer(tmp_path)
    config = {"name_or_path": "home/me", "vocab_file": "/home/me/x", "tokenizer_class": "X", "eos_token": "/"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer(tmp_path).info() == {"tokenizer_class": "X", "eos_token": "/"}

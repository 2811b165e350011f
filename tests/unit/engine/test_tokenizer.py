"""The tokenizer's files: what is read from them, and what is said when they are wrong."""

from __future__ import annotations

import json

import pytest

from amoe.engine.tokenizer import Tokenizer
from amoe.errors import CheckpointError, RequestError
from tests.fake_workers import EOS, make_tokenizer

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "<hi> & ü"}]


def with_template(tmp_path, template):
    return Tokenizer(make_tokenizer(tmp_path, chat_template=template))


def test_encode_and_decode(tmp_path):
    tokenizer = Tokenizer(make_tokenizer(tmp_path))
    text = "the dog, 你好 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == 300
    assert tokenizer.decode([0, *tokenizer.encode("x")]) == "x"
    assert tokenizer.decode([0, *tokenizer.encode("x")], skip_special_tokens=False) == f"{EOS}x"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()
    assert tokenizer.token_bytes(12345) == b""


def test_lone_surrogate_is_a_request_error(tmp_path):
    with pytest.raises(RequestError, match="not valid Unicode"):
        Tokenizer(make_tokenizer(tmp_path)).encode("a\ud800")


def test_missing_or_broken_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        Tokenizer(tmp_path)
    make_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: holds a list, not a JSON object"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


def test_render_chat(tmp_path):
    tokenizer = Tokenizer(make_tokenizer(tmp_path))
    assert tokenizer.render_chat(MESSAGES, {"add_generation_prompt": True}) == "s:be brief|u:<hi> & ü|a:"
    assert tokenizer.render_chat(MESSAGES[1:], {"add_generation_prompt": False}) == "u:<hi> & ü|"


def test_helpers_of_templates(tmp_path):
    template = (
        "{{ eos_token }}{{ {'a': 'ü<'} | tojson }}{{ strftime_now('%Y') | length }}{{ thinking }}\n"
        "{% for m in messages %}\n  {% if loop.index > 1 %}{% break %}{% endif %}\n"
        "{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}"
    )
    text = with_template(tmp_path, template).render_chat(MESSAGES, {"thinking": "no"})
    assert text == f'{EOS}{{"a": "ü<"}}4no\nsystem'


def test_template_file_and_named_templates(tmp_path):
    make_tokenizer(tmp_path, chat_template=None)
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert Tokenizer(tmp_path).render_chat(MESSAGES, {}) == "D"
    (tmp_path / "chat_template.jinja").write_text("F")
    assert Tokenizer(tmp_path).render_chat(MESSAGES, {}) == "F"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: .*utf-8"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "rejects the messages: roles must alternate"),
        ("{{ 'a' + messages }}", "cannot render these messages"),
        ("{{ messages.__class__.__mro__ }}", "rejects the messages"),  # the sandbox
    ],
)
def test_template_refusals(tmp_path, template, message):
    with pytest.raises(RequestError, match=message) as caught:
        with_template(tmp_path, template).render_chat(MESSAGES, {})
    assert caught.value.param == "messages"


def test_invalid_template(tmp_path):
    with pytest.raises(CheckpointError, match="chat template is invalid"):
        with_template(tmp_path, "{% for %}")

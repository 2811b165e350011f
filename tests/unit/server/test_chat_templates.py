"""Templates of requests, messages that are continued, and what else shapes a prompt."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from tests.unit.server.conftest import assert_error, events
from tests.unit.server.test_chat_tools import Serve, prompt_of, says
from tests.unit.server.test_chat_tools import serve as serve

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
OPEN_END: list[dict[str, Any]] = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Once upon"}]


async def test_the_last_message_is_continued(serve: Serve):
    server = await serve(TEMPLATE)
    says(server, " a time")
    fields = {"messages": OPEN_END, "add_generation_prompt": False, "continue_final_message": True}
    message = (await server.chat(**fields)).json()["choices"][0]["message"]
    assert prompt_of(server) == "<user>hi</><assistant>Once upon"
    assert message["content"] == " a time"
    message = (await server.chat(**fields, echo=True)).json()["choices"][0]["message"]
    assert message["content"] == "Once upon a time"
    chunks = events(await server.chat(**fields, echo=True, stream=True))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "Once upon"}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "Once upon a time"


async def test_echo_repeats_nothing_of_the_user(serve: Serve):
    server = await serve(TEMPLATE)
    says(server, "yes")
    assert (await server.chat(echo=True)).json()["choices"][0]["message"]["content"] == "yes"


async def test_a_template_that_drops_the_last_message_cannot_continue_it(serve: Serve):
    server = await serve("{{ messages[0].content }}")
    fields = {"messages": OPEN_END, "add_generation_prompt": False, "continue_final_message": True}
    assert_error(await server.chat(**fields), 400, "continue_final_message")
    assert_error(await server.chat(**{**fields, "add_generation_prompt": True}), 400, "continue_final_message")


async def test_templates_of_requests_need_trust(serve: Serve):
    server = await serve(TEMPLATE)
    assert_error(await server.chat(chat_template="{{ messages }}"), 400, "chat_template")
    server = await serve(TEMPLATE, trust_request_chat_template=True)
    says(server, "x")
    assert (
        await server.chat(chat_template="T:{{ messages[0].content }}{{ x }}", chat_template_kwargs={"x": 5})
    ).is_success
    assert prompt_of(server) == "T:hi5"
    assert_error(await server.chat(chat_template="{% if %}"), 400, "chat_template")


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{{ 'x' * 10 ** 10 }}",
        "{{ 'x' * 10000000000 }}",
        "{{ '%9999999999d' % 5 }}",
        "{{ 'x' | center(9999999999) }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ messages | map(attribute='a.b') | first + 1 }}",
        "{{ raise_exception('no') }}",
    ],
)
async def test_hostile_templates_end(serve: Serve, template: str):
    server = await serve(TEMPLATE, trust_request_chat_template=True)
    response = await server.chat(chat_template=template)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] in ("messages", "chat_template")


@pytest.mark.parametrize("says", ["{{ raise_exception(messages[0].content) }}", "{{ {}[messages[0].content] + 1 }}"])
async def test_what_a_template_quotes_is_not_logged(serve: Serve, caplog: pytest.LogCaptureFixture, says: str):
    caplog.set_level(logging.INFO, "amoe.request")
    server = await serve(says)
    message = assert_error(await server.chat(messages=[{"role": "user", "content": "secret"}]), 400, "messages")
    assert "secret" in message
    (line,) = [record.fields for record in caplog.records if record.getMessage() == "request ended"]
    assert line["error"].startswith("the chat template")
    assert "secret" not in line["error"]


async def test_a_long_conversation_is_no_endless_loop(serve: Serve):
    server = await serve(TEMPLATE, trust_request_chat_template=True)
    says(server, "x")
    messages = [{"role": "user", "content": "x"}] * 300
    assert (await server.chat(messages=messages, chat_template=TEMPLATE)).is_success


async def test_what_is_told_of_tokens(serve: Serve):
    server = await serve(TEMPLATE)
    says(server, "yes")
    ids = [*server.ids("yes"), 0]
    prompt = server.ids("<user>hi</><a>")
    fields = {"return_token_ids": True, "prompt_logprobs": 1, "n": 2}
    body = (await server.chat(**fields)).json()
    assert body["prompt_token_ids"] == prompt
    assert [choice["token_ids"] for choice in body["choices"]] == [ids, ids]
    assert body["prompt_logprobs"][0] is None
    assert len(body["prompt_logprobs"]) == len(prompt)
    chunks = events(await server.chat(**fields, stream=True))
    assert [chunk["prompt_token_ids"] for chunk in chunks if "prompt_token_ids" in chunk] == [prompt]
    assert [chunk["prompt_logprobs"] for chunk in chunks if "prompt_logprobs" in chunk] == [body["prompt_logprobs"]]
    for index in range(2):
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert [token for choice in choices for token in choice.get("token_ids", ())] == ids


async def test_records_of_clients_are_accepted(serve: Serve):
    server = await serve(TEMPLATE)
    says(server, "x")
    fields = {"store": True, "metadata": {"a": "b"}, "user": "u", "service_tier": "auto", "prompt_cache_key": "k"}
    more = {"safety_identifier": "s", "verbosity": "low", "modalities": ["text"], "reasoning_effort": "high"}
    body = (await server.chat(**fields, **more)).json()
    assert body["service_tier"] is None
    assert body["system_fingerprint"] is None


async def test_prompts_are_truncated(serve: Serve):
    server = await serve(TEMPLATE)
    says(server, "x")
    await server.chat(truncate_prompt_tokens=2)
    assert server.worker.requests[-1].prompt_token_ids == server.ids("<user>hi</><a>")[-2:]

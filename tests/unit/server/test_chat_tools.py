"""Tools in /v1/chat/completions: what reaches the template and the worker, and how calls come back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from llguidance import LLMatcher, LLTokenizer

from amoe.server.app import create_app
from amoe.server.chat_options import ChatOptions
from amoe.server.context import ServerContext
from tests.fake_workers import make_engine, make_tokenizer
from tests.unit.server.conftest import Harness, assert_error, events

# Of the shape of Qwen's.
QWEN_TEMPLATE = (
    "{%- if tools %}TOOLS:{% for tool in tools %}{{ tool | tojson }};{% endfor %}<tool_call>{% endif %}\n"
    "{%- for m in messages %}{{ m.role }}={{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.arguments.city }}{% endfor %}"
    "{% if m.role == 'tool' %}({{ m.tool_call_id }}){% endif %}|{% endfor %}"
)
PLAIN_TEMPLATE = "{% for m in messages %}{{ m.role }}={{ m.content }}|{% endfor %}"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "now"}}
NAMED = {"type": "function", "function": {"name": "now"}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'

Serve = Callable[..., Any]


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Serve]:
    """Makes servers over fake workers: `await serve(template, options)`."""
    opened = []

    async def make(template: str | None = QWEN_TEMPLATE, **options: Any) -> Harness:
        path = make_tokenizer(tmp_path / str(len(opened)), chat_template=template)
        engine, (worker,) = make_engine(path)
        engine.model = dataclasses.replace(engine.model, max_model_len=4000)
        app = create_app(ServerContext(engine=engine, model_names=("fake",), chat=ChatOptions(**options)))
        http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
        opened.append((http, engine, worker))
        return Harness(app, engine, worker, http)

    yield make
    for http, engine, worker in opened:
        await http.aclose()
        assert engine.num_open == 0
        await engine.close()
        worker.die()


def says(server: Harness, text: str) -> None:
    """The worker answers `text`, and ends."""
    server.worker.script = lambda _: [*server.ids(text), 0]


def prompt_of(server: Harness) -> str:
    return server.engine.tokenizer.decode(server.worker.requests[-1].prompt_token_ids)


def accepts(grammar: str | None, text: str) -> bool:
    """The grammar takes `text`, and nothing has to follow it."""
    assert grammar is not None
    tokens = LLTokenizer("byte")
    matcher = LLMatcher(tokens, grammar)
    assert not matcher.is_error(), matcher.get_error()
    ids = tokens.tokenize_str(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


async def test_a_call(serve: Serve):
    server = await serve()
    says(server, f"Let me see.\n{CALL}")
    choice = (await server.chat(tools=[WEATHER])).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] == "Let me see."
    (call,) = message["tool_calls"]
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    assert prompt_of(server).startswith(f"TOOLS:{json.dumps(WEATHER)};")
    assert server.params.grammar is None


async def test_content_is_null_beside_calls_alone_and_no_calls_are_left_out(serve: Serve):
    server = await serve()
    says(server, CALL)
    assert (await server.chat(tools=[WEATHER])).json()["choices"][0]["message"]["content"] is None
    says(server, "No.")
    choice = (await server.chat(tools=[WEATHER])).json()["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "No.", "refusal": None}
    assert choice["finish_reason"] == "stop"


async def test_a_stream_adds_up_to_the_whole(serve: Serve):
    server = await serve()
    says(server, f"Let me see.\n{CALL}\n{CALL} Done <tool")
    whole = (await server.chat(tools=[WEATHER])).json()["choices"][0]
    chunks = [chunk["choices"][0] for chunk in events(await server.chat(tools=[WEATHER], stream=True, logprobs=True))]
    content = "".join(chunk["delta"].get("content") or "" for chunk in chunks)
    assert content == whole["message"]["content"]
    pieces = [piece for chunk in chunks for piece in chunk["delta"].get("tool_calls", ())]
    for index, call in enumerate(whole["message"]["tool_calls"]):
        mine = [piece for piece in pieces if piece["index"] == index]
        assert mine[0]["id"]
        assert mine[0]["type"] == "function"
        assert mine[0]["function"]["name"] == "get_weather"
        assert all("id" not in piece and set(piece["function"]) == {"arguments"} for piece in mine[1:])
        assert len(mine) > 3, "arguments have to come as they grow"
        assert "".join(piece["function"]["arguments"] for piece in mine) == call["function"]["arguments"]
    assert chunks[0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["tool_calls"]
    # Log-probabilities cover each token once, though text is held back.
    names = [entry["token"] for chunk in chunks for entry in (chunk["logprobs"] or {"content": []})["content"]]
    assert "".join(names).startswith("Let me see.\n<tool_call>")


@pytest.mark.parametrize(
    "fields", [{}, {"tools": []}, {"tools": [WEATHER], "tool_choice": "none"}, {"tool_choice": "auto"}]
)
async def test_without_tools_nothing_is_looked_for(serve: Serve, fields: dict[str, Any]):
    server = await serve()
    says(server, CALL)
    choice = (await server.chat(**fields)).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")
    assert not prompt_of(server).startswith("TOOLS")


async def test_other_types_of_tools_are_skipped(serve: Serve):
    server = await serve()
    says(server, "x")
    assert (await server.chat(tools=[{"type": "web_search", "function": 5}, WEATHER])).status_code == 200
    assert prompt_of(server).startswith(f"TOOLS:{json.dumps(WEATHER)};<")


async def test_required(serve: Serve):
    server = await serve()
    says(server, CALL)
    choice = (await server.chat(tools=[WEATHER, TIME], tool_choice="required")).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    now = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    assert accepts(server.params.grammar, CALL)
    assert accepts(server.params.grammar, f"{CALL}\n{now}")
    assert not accepts(server.params.grammar, "text")
    assert not accepts(server.params.grammar, CALL.replace('"Paris"', "5"))
    assert not accepts(server.params.grammar, CALL.replace('"Paris"', '"Paris", "extra": 1'))
    assert not accepts(server.params.grammar, CALL.replace("get_weather", "get"))
    await server.chat(tools=[WEATHER, TIME], tool_choice="required", parallel_tool_calls=False)
    assert accepts(server.params.grammar, CALL)
    assert not accepts(server.params.grammar, f"{CALL}\n{now}")


async def test_named_is_called_once_and_ends_with_stop(serve: Serve):
    server = await serve()
    says(server, '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>')
    choice = (await server.chat(tools=[WEATHER, TIME], tool_choice=NAMED)).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}
    assert not accepts(server.params.grammar, CALL)


async def test_allowed_tools(serve: Serve):
    server = await serve()
    says(server, CALL)
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}
    await server.chat(tools=[WEATHER, TIME], tool_choice=allowed)
    assert not accepts(server.params.grammar, CALL)
    assert accepts(server.params.grammar, '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>')


async def test_strict_holds_arguments_to_the_schema_while_text_is_free(serve: Serve):
    server = await serve()
    says(server, CALL)
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    await server.chat(tools=[strict, TIME])
    grammar = server.params.grammar
    assert accepts(grammar, "No.")
    assert accepts(grammar, f"Yes. {CALL} Well.")
    assert not accepts(grammar, CALL.replace('"city"', '"town"'))
    assert accepts(grammar, '<tool_call>\n{"name": "now", "arguments": {"free": 1}}\n</tool_call>')


async def test_answers_have_a_structure_or_call(serve: Serve):
    server = await serve()
    says(server, CALL)
    await server.chat(tools=[WEATHER], response_format={"type": "json_object"})
    assert accepts(server.params.grammar, CALL)
    assert accepts(server.params.grammar, '{"a":1}')
    assert not accepts(server.params.grammar, "text")


async def test_tokens_that_are_marks_stay_in_the_text(serve: Serve):
    server = await serve()
    tokenizer = server.engine.tokenizer
    tokenizer._tokenizer.add_special_tokens(["<tool_call>", "</tool_call>", "<|turn|>"])
    ids = {text: tokenizer._tokenizer.token_to_id(text) for text in ("<tool_call>", "</tool_call>", "<|turn|>")}
    tokenizer.special_ids.update(ids.values())
    server.engine.model = dataclasses.replace(server.engine.model, vocab_size=400)
    says(server, f"Hm.<|turn|>{CALL}<|turn|>")
    message = (await server.chat(tools=[WEATHER])).json()["choices"][0]["message"]
    assert message["content"] == "Hm."
    assert message["tool_calls"][0]["function"]["arguments"] == '{"city": "Paris"}'
    await server.chat(tools=[WEATHER], tool_choice="required")
    assert f"<[{ids['<tool_call>']}]>" in server.params.grammar
    says(server, CALL)
    content = (await server.chat()).json()["choices"][0]["message"]["content"]
    assert "<tool_call>" not in content, "without tools they are special tokens like all others"


@pytest.mark.parametrize(("parser", "begin", "end"), [("mistral", "[TOOL_CALLS][", "]"), ("json", "", "")])
async def test_other_formats(serve: Serve, parser: str, begin: str, end: str):
    server = await serve(tool_call_parser=parser)
    call = f'{begin}{{"name": "get_weather", "arguments": {{"city": "Paris"}}}}{end}'
    says(server, call)
    choice = (await server.chat(tools=[WEATHER], tool_choice="required")).json()["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Paris"}'
    assert accepts(server.params.grammar, call)


async def test_a_conversation_with_calls_reaches_the_template(serve: Serve):
    server = await serve()
    says(server, "x")
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [call],
            "function_call": None,
            "refusal": None,
            "audio": None,
        },
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "21"}]},
        {"role": "assistant", "content": "warm", "annotations": [], "reasoning": None, "tool_calls": []},
    ]
    assert (await server.chat(messages=messages)).status_code == 200
    assert prompt_of(server) == "user=hi|assistant=<tool_call>Rome|tool=21(c1)|assistant=warm|"


async def test_a_template_that_knows_no_tools(serve: Serve):
    server = await serve(PLAIN_TEMPLATE)
    says(server, '{"name": "get_weather", "arguments": {"city": "Paris"}}')
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": ""}}
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "well", "tool_calls": [call, {**call, "id": "c2"}]},
        {"role": "tool", "tool_call_id": "c1", "content": "12:00"},
        {"role": "tool", "tool_call_id": "c2", "content": "12:01"},
    ]
    choice = (await server.chat(messages=messages, tools=[WEATHER])).json()["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "get_weather"
    assert prompt_of(server) == (
        "system=S\n\nFunctions that you can call:\n"
        + json.dumps(WEATHER["function"])
        + '\nTo call one, answer only: {"name": "NAME", "arguments": {...}}|user=hi|assistant=well\n'
        '{"name": "now", "arguments": {}}\n{"name": "now", "arguments": {}}|'
        "user=Result of now: 12:00\nResult of now: 12:01|"
    )
    await server.chat(tools=[TIME])
    assert prompt_of(server).startswith("system=Functions that you can call:\n")


BAD_NAME = {"type": "function", "function": {"name": "with space"}}
BAD_SCHEMA = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": 5}}}
NO_OBJECT = {"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}
BAD_REF = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"$ref": "#/$defs/X"}}}}}
UNENFORCEABLE = {
    "type": "function",
    "function": {
        "name": "f",
        "strict": True,
        "parameters": {"properties": {"a": {"uniqueItems": True, "type": "array"}}},
    },
}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": 5}, "tools"),
        ({"tools": [5]}, "tools.0"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [WEATHER, BAD_NAME]}, "tools.1.function.name"),
        ({"tools": [BAD_SCHEMA]}, "tools.0.function.parameters"),
        ({"tools": [NO_OBJECT]}, "tools.0.function.parameters"),
        ({"tools": [WEATHER, BAD_REF], "tool_choice": "required"}, "tools.1.function.parameters"),
        ({"tools": [UNENFORCEABLE]}, "tools.0.function.parameters"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": NAMED}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": 5}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"modalities": ["audio"]}, "modalities"),
    ],
)
async def test_bad_tools(serve: Serve, fields: dict[str, Any], param: str):
    server = await serve()
    says(server, "x")
    assert_error(await server.chat(**fields), 400, param)


async def test_auto_may_be_off(serve: Serve):
    server = await serve(auto_tool_choice=False)
    says(server, CALL)
    assert_error(await server.chat(tools=[WEATHER]), 400, "tool_choice")
    assert (await server.chat(tools=[WEATHER], tool_choice="required")).status_code == 200

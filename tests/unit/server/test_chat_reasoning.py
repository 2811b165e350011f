"""Thoughts in /v1/chat/completions."""

from __future__ import annotations

import json

import pytest

from amoe.errors import ConfigError
from amoe.server.chat_options import ChatOptions
from tests.unit.server.conftest import Harness, events
from tests.unit.server.test_chat_tools import CALL, WEATHER, Serve, accepts, says
from tests.unit.server.test_chat_tools import serve as serve

TEMPLATE = "{% for m in messages %}{{ m.role }}={{ m.reasoning_content or '' }}{{ m.content }}|{% endfor %}{{ tail }}"


async def test_thoughts_under_both_names(serve: Serve):
    server = await serve(TEMPLATE, reasoning_parser="qwen3")
    says(server, "<think>\nhm\n</think>\n\nYes.")
    body = (await server.chat()).json()
    message = body["choices"][0]["message"]
    assert message == {
        "role": "assistant",
        "content": "Yes.",
        "refusal": None,
        "reasoning": "hm",
        "reasoning_content": "hm",
    }
    num_tokens = len(server.ids("<think>\nhm\n</think>"))
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": num_tokens}
    says(server, "Yes.")
    body = (await server.chat()).json()
    assert body["choices"][0]["message"]["reasoning"] is None
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}


async def test_a_stream_of_thoughts(serve: Serve):
    server = await serve(TEMPLATE, reasoning_parser="deepseek_r1", tool_call_parser="hermes")
    says(server, f"so {CALL} it is\n</think>\n\nYes.{CALL}")
    fields = {"tools": [WEATHER], "stream": True, "stream_options": {"include_usage": True}, "tool_choice": "auto"}
    chunks = events(await server.chat(**fields))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert "".join(delta.get("reasoning", "") for delta in deltas) == f"so {CALL} it is"
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == f"so {CALL} it is"
    assert "".join(delta.get("content", "") for delta in deltas) == "Yes."
    assert sum("tool_calls" in delta for delta in deltas) > 1, "those among thoughts are none"
    assert all(len(set(delta) & {"content", "reasoning", "tool_calls"}) <= 1 for delta in deltas)
    assert chunks[-1]["usage"]["completion_tokens_details"] == {
        "reasoning_tokens": len(server.ids(f"so {CALL} it is\n</think>"))
    }


async def test_thoughts_may_be_left_out(serve: Serve):
    server = await serve(TEMPLATE, reasoning_parser="deepseek_r1")
    says(server, "hm</think>Yes.")
    body = (await server.chat(include_reasoning=False)).json()
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "Yes.", "refusal": None}
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    says(server, "hm")
    assert (await server.chat()).json()["choices"][0]["message"]["content"] is None


async def test_the_prompt_may_say_where_the_answer_starts(serve: Serve):
    server = await serve(TEMPLATE, reasoning_parser="qwen3")
    says(server, "hm</think>Yes.")
    message = (await server.chat(chat_template_kwargs={"tail": "<think>\n"})).json()["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("hm", "Yes.")
    message = (await server.chat(chat_template_kwargs={"tail": "<think>\n\n</think>\n\n"})).json()["choices"][0][
        "message"
    ]
    assert (message["reasoning"], message["content"]) == (None, "hm</think>Yes.")


async def test_thoughts_of_the_past_reach_the_template(serve: Serve):
    server = await serve(TEMPLATE)
    for name in ("reasoning", "reasoning_content"):
        await server.chat(messages=[{"role": "assistant", "content": "A", name: "T"}], max_tokens=1)
        prompt = server.engine.tokenizer.decode(server.worker.requests[-1].prompt_token_ids)
        assert prompt == "assistant=TA|"


@pytest.mark.parametrize(
    ("parser", "before", "other"),
    [
        ("deepseek_r1", "any {thought</think>\n\n", ""),
        ("qwen3", "<think>x</think>\n", "x</think>"),
        ("qwen3", "", "<think>x"),
    ],
)
async def test_structure_comes_after_thoughts(serve: Serve, parser: str, before: str, other: str):
    server = await serve(TEMPLATE, reasoning_parser=parser)
    says(server, f'{before}{{"a":1}}')
    message = (await server.chat(response_format={"type": "json_object"})).json()["choices"][0]["message"]
    assert json.loads(message["content"]) == {"a": 1}
    assert accepts(server.params.grammar, f'{before}{{"a":1}}')
    assert not accepts(server.params.grammar, f'{other}{{"a":1}}')
    assert not accepts(server.params.grammar, f"{before}text")
    await server.chat(tools=[WEATHER], tool_choice="required")
    call = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
    assert accepts(server.params.grammar, f"{before}{call}")


async def test_marks_of_ones_own(serve: Serve):
    server: Harness = await serve(TEMPLATE, reasoning_parser="custom", reasoning_markers=("<a>", "</a>"))
    says(server, "<a>hm</a>Yes.")
    assert (await server.chat()).json()["choices"][0]["message"]["reasoning"] == "hm"


@pytest.mark.parametrize(
    "options",
    [
        {"reasoning_parser": "custom"},
        {"reasoning_markers": ("a", "b")},
        {"reasoning_parser": "custom", "reasoning_markers": ("a", "")},
        {"reasoning_parser": "unknown"},
        {"tool_call_parser": "unknown"},
    ],
)
def test_bad_options(options):
    with pytest.raises(ConfigError, match="--"):
        ChatOptions(**options)

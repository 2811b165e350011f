"""Parsers of tool calls: what they find, and that it does not matter in which pieces the text comes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoe.server.parsers.base import ToolParser
from amoe.server.parsers.formats import TOOL_FORMATS, FormatName, format_for
from amoe.server.parsers.hermes import HermesParser
from amoe.server.parsers.mistral import MistralParser
from amoe.server.parsers.plain_json import PlainJsonParser

NAMES = frozenset({"f", "get_weather"})
Calls = list[tuple[str, str]]


def parser(name: FormatName) -> ToolParser:
    numbers = itertools.count()
    kinds = {"hermes": HermesParser, "mistral": MistralParser, "json": PlainJsonParser}
    return kinds[name](lambda: f"call_{next(numbers)}", NAMES if TOOL_FORMATS[name].checks_names else None)


def read(name: FormatName, pieces: Sequence[str]) -> tuple[str, Calls]:
    """Content and calls of a text that comes in `pieces`; checks that every call begins once, and in order."""
    tools = parser(name)
    content, names, arguments = "", [], []
    for parsed in [*map(tools.push, pieces), tools.finish()]:
        content += parsed.content
        for piece in parsed.calls:
            if piece.id is not None:
                assert piece.id == f"call_{len(names)}"
                assert piece.index == len(names)
                names.append(piece.name)
                arguments.append("")
            else:
                assert piece.name is None
                assert piece.arguments
            assert piece.index == len(names) - 1
            arguments[piece.index] += piece.arguments
    return content, list(zip(names, arguments, strict=True))


def hermes(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


F = '{"name": "f", "arguments": {"a": 1}}'
NESTED = '{"name": "f", "arguments": {"a": {"b": [1, {"c": "}]"}]}, "d": "\\"</tool_call>{"}}'
NESTED_ARGUMENTS = '{"a": {"b": [1, {"c": "}]"}]}, "d": "\\"</tool_call>{"}'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("", "", []),
        (" plain < text ", " plain < text ", []),
        (hermes(F), "", [("f", '{"a": 1}')]),
        (hermes(F, NESTED), "", [("f", '{"a": 1}'), ("f", NESTED_ARGUMENTS)]),
        (f"<tool_call>{F}</tool_call>", "", [("f", '{"a": 1}')]),
        (f"Let me see.\n\n{hermes(F)}\n", "Let me see.", [("f", '{"a": 1}')]),
        (f"{hermes(F)}\nThere.", "\nThere.", [("f", '{"a": 1}')]),
        (f"A\n{hermes(F)} B {hermes(F)} C", "A\n B  C", [("f", '{"a": 1}')] * 2),
        (hermes('{"arguments": {"a": 1}, "name": "f"}'), "", [("f", '{"a": 1}')]),
        (hermes('{"name": "f"}'), "", [("f", "{}")]),
        (hermes('{"name": "f", "arguments": null}'), "", [("f", "{}")]),
        (hermes('{"name": "f", "arguments": "{\\"a\\": 1}"}'), "", [("f", '{"a": 1}')]),
        (hermes('{"name": "unknown", "arguments": {}}'), "", [("unknown", "{}")]),
        (hermes('{ "name" : "f" ,\n "arguments" : { } }'), "", [("f", "{ }")]),
        # Models that forget the tag between or after calls.
        (f"<tool_call>{F}\n{F}</tool_call>", "", [("f", '{"a": 1}')] * 2),
        (f"<tool_call>{F}", "", [("f", '{"a": 1}')]),
        # Cut off: what has begun is a call, as far as it goes.
        ('<tool_call>{"name": "f", "arguments": {"a": "x', "", [("f", '{"a": "x')]),
        ('<tool_call>{"name": "f', '<tool_call>{"name": "f', []),
        ("so <tool_c", "so <tool_c", []),
        # Malformed: nothing is lost.
        ("<tool_call>f(1)</tool_call>", "<tool_call>f(1)</tool_call>", []),
        (hermes('{"name": 5, "arguments": {}}'), hermes('{"name": 5, "arguments": {}}'), []),
        (hermes('{"name": "", "arguments": {}}'), hermes('{"name": "", "arguments": {}}'), []),
        (hermes('{"title": "f"}'), hermes('{"title": "f"}'), []),
        (hermes('{"name": "f", "arguments": [1]}'), hermes('{"name": "f", "arguments": [1]}'), []),
        (f"<tool_call>x {hermes(F)}", "<tool_call>x", [("f", '{"a": 1}')]),
        ('<tool_call>{"name": "f", "arguments": {} oops}</tool_call>', "oops}</tool_call>", [("f", "{}")]),
    ],
)
def test_hermes(text, content, calls):
    assert read("hermes", [text]) == (content, calls)
    assert read("hermes", list(text)) == (content, calls)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"[TOOL_CALLS][{F}]", "", [("f", '{"a": 1}')]),
        (f"[TOOL_CALLS] [ {F} ,{NESTED}] ", "", [("f", '{"a": 1}'), ("f", NESTED_ARGUMENTS)]),
        ('[TOOL_CALLS]f{"a": "}"}', "", [("f", '{"a": "}"}')]),
        ('ok[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]get_weather{}', "ok", [("f", '{"a": 1}'), ("get_weather", "{}")]),
        ('[TOOL_CALLS]f[CALL_ID]a1B2c3D4e[ARGS]{"a": 1}', "", [("f", '{"a": 1}')]),
        (f"[TOOL_CALLS]{F}", "", [("f", '{"a": 1}')]),
        (f"[TOOL_CALLS][{F}, nothing]", ", nothing]", [("f", '{"a": 1}')]),
        ('[TOOL_CALLS]f{"a": "x', "", [("f", '{"a": "x')]),
        ("[TOOL_CALLS]f[ARG", "[TOOL_CALLS]f[ARG", []),
        ("[TOOL_CALLS] sorry!", "[TOOL_CALLS] sorry!", []),
        ("[TOOL_CALLS][]", "[TOOL_CALLS][]", []),
        (f"[TOOL_CALLS]{'x' * 65}{{}}", f"[TOOL_CALLS]{'x' * 65}{{}}", []),
        ("[TOOL", "[TOOL", []),
        ("a[0] = [1]", "a[0] = [1]", []),
    ],
)
def test_mistral(text, content, calls):
    assert read("mistral", [text]) == (content, calls)
    assert read("mistral", list(text)) == (content, calls)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (F, "", [("f", '{"a": 1}')]),
        ('{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
        ('{"type": "function", "name": "f", "parameters": {}}', "", [("f", "{}")]),
        (f"[{F}, {F}]", "", [("f", '{"a": 1}')] * 2),
        (f"{F}; {F}\n{F}", "", [("f", '{"a": 1}')] * 3),
        (f"Sure:\n```json\n{F}\n```", "Sure:\n```json\n\n```", [("f", '{"a": 1}')]),
        # Other JSON is for people to read, even where it looks like a call at first.
        ('{"name": "Ada", "arguments": {}}', '{"name": "Ada", "arguments": {}}', []),
        ('{"city": {"name": "f", "arguments": {}}}', '{"city": {"name": "f", "arguments": {}}}', []),
        ('[1, 2] and {"a": [ {} ]}', '[1, 2] and {"a": [ {} ]}', []),
        ('say {"name": "f"} to call', 'say {"name": "f"} to call', []),
        (f"[{F}, 5]", ", 5]", [("f", '{"a": 1}')]),
        ('[{"name": "Ada"}]', '[{"name": "Ada"}]', []),
        ("[ ", "[ ", []),
    ],
)
def test_plain_json(text, content, calls):
    assert read("json", [text]) == (content, calls)
    assert read("json", list(text)) == (content, calls)


SNIPPETS = st.sampled_from(
    [
        *(
            "<tool_call>",
            "</tool_call>",
            "<tool_",
            "[TOOL_CALLS]",
            "[ARGS]",
            "[CALL_ID]",
            "[",
            "]",
            "{",
            "}",
            ", ",
            ";",
        ),
        *('"', "\\", ":", '"name"', '"arguments"', '"parameters"', '"f"', '"get_weather"', "f", "\n", " ", "x", "null"),
        *(F, NESTED, '{"name": "f", ', '"arguments": {', '{"a": [1, "', "é🙂"),
    ]
)


@given(name=st.sampled_from(get_args(FormatName)), snippets=st.lists(SNIPPETS, max_size=14), data=st.data())
def test_pieces_do_not_matter(name, snippets, data):
    text = "".join(snippets)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]
    whole = read(name, [text])
    assert read(name, pieces) == whole
    assert read(name, list(text)) == whole


@given(name=st.sampled_from(get_args(FormatName)), snippets=st.lists(SNIPPETS, max_size=14))
def test_without_a_call_nothing_is_lost(name, snippets):
    text = "".join(snippets)
    content, calls = read(name, [text])
    assert calls or content == text


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(
    name=st.sampled_from(get_args(FormatName)),
    calls=st.lists(
        st.tuples(st.sampled_from(sorted(NAMES)), st.dictionaries(st.text(), JSON_VALUES, max_size=3)),
        min_size=1,
        max_size=3,
    ),
)
def test_what_a_format_writes_it_reads(name, calls):
    content, found = read(name, [TOOL_FORMATS[name].write(calls)])
    assert content == ""
    assert [(function, json.loads(arguments)) for function, arguments in found] == calls


def test_arguments_stream_while_they_grow():
    tools = parser("hermes")
    seen = [tools.push(piece) for piece in ('<tool_call>{"name": "f", "arguments": {"a"', ': "long', ' text"', "}}")]
    assert [[piece.arguments for piece in parsed.calls] for parsed in seen] == [
        ['{"a"'],
        [': "long'],
        [' text"'],
        ["}"],
    ]


def test_text_goes_out_at_once_but_for_what_may_be_a_mark():
    tools = parser("hermes")
    assert [tools.push(piece).content for piece in ("a <", "b", " <tool", "s")] == ["a", " <b", "", " <tools"]


def test_the_template_tells_the_format():
    assert format_for("... <tool_call> ...").name == "hermes"
    assert format_for("{{ '[TOOL_CALLS]' }}").name == "mistral"
    assert format_for("{{ messages }}").name == "json"
    assert len(TOOL_FORMATS["mistral"].new_id()) == 9
    assert TOOL_FORMATS["hermes"].new_id().startswith("call_")

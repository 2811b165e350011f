"""From text to thoughts, content and calls: answers that must call a function, cut off anywhere, in any pieces."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amoe.engine.generation import GenerationDelta
from amoe.server.answer import AnswerFormat, AnswerReader
from amoe.server.chat_schemas import FunctionDefinition
from amoe.server.parsers.formats import TOOL_FORMATS, FormatName
from amoe.server.parsers.reasoning import REASONING_FORMATS
from amoe.server.tools import ToolPlan

FUNCTIONS = tuple(enumerate(FunctionDefinition.model_validate({"name": name}) for name in ("answer", "get_weather")))
# What stands around several calls, by format, as the grammars have it.
MANY = {
    "hermes": ("<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"),
    "mistral": ("[TOOL_CALLS][", ", ", "]"),
    "json": ("[", ", ", "]"),
}
THOUGHTS = 'I had better call {"name": "answer", "arguments": {}} now.'
Calls = list[tuple[str, dict[str, Any]]]


class Answer(NamedTuple):
    """All deltas of an answer, put together."""

    reasoning: str
    content: str
    calls: list[tuple[str, str]]
    ending: str


def read(format_: FormatName, mode: Any, pieces: Sequence[str], ending: Any, *, thinks: bool = False) -> Answer:
    answers = AnswerFormat(
        plan=ToolPlan(mode=mode, functions=FUNCTIONS),
        tools=TOOL_FORMATS[format_],
        reasoning=REASONING_FORMATS["qwen3"] if thinks else None,
    )
    reader = AnswerReader(0, answers, lambda _: b"")
    answer = Answer("", "", [], "")
    for number, piece in enumerate(pieces):
        is_last = number == len(pieces) - 1
        delta = reader.read(GenerationDelta(text=piece, finish_reason=ending if is_last else None))
        calls = answer.calls
        for call in delta.tool_calls:
            if call.name is not None:
                calls.append((call.name, ""))
            name, arguments = calls[call.index]
            calls[call.index] = (name, arguments + call.arguments)
        answer = Answer(
            answer.reasoning + delta.reasoning, answer.content + delta.content, calls, delta.finish_reason or ""
        )
    return answer


def write(format_: FormatName, calls: Calls) -> str:
    if len(calls) == 1:
        return TOOL_FORMATS[format_].write(calls)
    before, between, after = MANY[format_]
    return before + between.join(json.dumps({"name": name, "arguments": value}) for name, value in calls) + after


def expected_calls(text: str, calls: Calls, *, start: int) -> list[tuple[str, str]]:
    """Calls of a text that was cut off: those whose arguments have begun, as far as they go."""
    found = []
    for name, value in calls:
        head, arguments = f'{{"name": {json.dumps(name)}, "arguments": ', json.dumps(value)
        at = text.find(head, start)
        if at < 0 or at + len(head) == len(text):
            break
        start = at + len(head)
        found.append((name, text[start : start + len(arguments)]))
        start += len(arguments)
    return found


ARGUMENTS = st.dictionaries(
    st.text('a"{', max_size=3),
    st.integers() | st.text('x"\\{}[],é</tool_call>', max_size=12) | st.lists(st.booleans(), max_size=2),
    max_size=2,
)
CALLS = st.lists(st.tuples(st.sampled_from(["answer", "get_weather"]), ARGUMENTS), min_size=1, max_size=3)


@given(
    format_=st.sampled_from(get_args(FormatName)),
    mode=st.sampled_from(["required", "named"]),
    calls=CALLS,
    thinks=st.booleans(),
    data=st.data(),
)
def test_a_forced_answer_is_calls_wherever_it_is_cut_off(
    format_: FormatName, mode: Any, calls: Calls, thinks: bool, data: st.DataObject
) -> None:
    marks = f"<think>{THOUGHTS}</think>\n\n" if thinks else ""
    whole = marks + write(format_, calls)
    text = whole[: data.draw(st.integers(0, len(whole)))]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]
    at_once = read(format_, mode, [text], "length", thinks=thinks)
    assert at_once.content == ""
    assert at_once.ending == "length"
    assert at_once.calls == expected_calls(text, calls, start=len(marks))
    assert at_once.reasoning == "" or THOUGHTS.startswith(at_once.reasoning)
    assert read(format_, mode, pieces, "length", thinks=thinks) == at_once
    assert read(format_, mode, [*text, ""], "length", thinks=thinks) == at_once


@given(format_=st.sampled_from(get_args(FormatName)), mode=st.sampled_from(["required", "named"]), calls=CALLS)
def test_a_forced_answer_that_ends_has_all_its_calls(format_: FormatName, mode: Any, calls: Calls) -> None:
    answer = read(format_, mode, [write(format_, calls)], "stop")
    assert answer.content == ""
    assert [(name, json.loads(arguments)) for name, arguments in answer.calls] == calls
    assert answer.ending == ("stop" if mode == "named" else "tool_calls")


@pytest.mark.parametrize(
    ("format_", "text", "calls"),
    [
        ("json", '[{"name": "answer', []),
        ("json", '{"name": "answer", "arguments": ', []),
        ("json", '{"name": "answer", "arguments": {', [("answer", "{")]),
        ("json", '[{"name": "answer", "arguments": {}}, {"name": "', [("answer", "{}")]),
        ("hermes", "<tool_", []),
        ("hermes", '<tool_call>\n{"name": "answer", "arguments": {}}\n</tool', [("answer", "{}")]),
        ("mistral", '[TOOL_CALLS][{"na', []),
    ],
)
def test_the_head_of_a_call_is_text_only_where_text_could_be_meant(
    format_: FormatName, text: str, calls: list[tuple[str, str]]
) -> None:
    for mode in ("required", "named"):
        assert read(format_, mode, [text], "length") == ("", "", calls, "length")
    free = read(format_, "auto", [text], "length")
    assert free.calls == calls
    assert free.content == text or calls  # else nothing is lost

"""Structured output: what a request may say, and the grammar that it becomes."""

from __future__ import annotations

import json

import pytest
from llguidance import LLMatcher, LLTokenizer

from amoe.server.structured import choice_grammar, context_free_grammar, json_schema_grammar
from tests.unit.server.conftest import Harness, assert_error

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


def follows(grammar: str, text: str) -> bool:
    """The whole of `text`, and nothing more, is what the grammar wants."""
    tokenizer = LLTokenizer("byte")
    matcher = LLMatcher(tokenizer, grammar)
    assert not matcher.is_error(), matcher.get_error()
    tokens = list(text.encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


ACCEPTED = [
    ({"response_format": {"type": "json_object"}}, '{"a":[1,2]}', "[1]"),
    ({"response_format": {"type": "json_object"}}, '{"a":1}', '{"a": 1}'),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}},
        '{"a":5}',
        '{"b":5}',
    ),
    ({"structured_outputs": {"json": SCHEMA}}, '{"a":5}', '{"a":"5"}'),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, '{"a":5}', "{}"),
    ({"structured_outputs": {"json_object": True}}, "{}", "[]"),
    ({"structured_outputs": {"regex": r"\d{3}☃?"}}, "123☃", "12"),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, "no", "maybe"),
    ({"structured_outputs": {"grammar": 'start: "a" start | "b"'}}, "aab", "aa"),
    ({"structured_outputs": {"grammar": 'root ::= "(" root ")" | [0-9]+'}}, "((12))", "((12)"),
]


@pytest.mark.parametrize(("fields", "good", "bad"), ACCEPTED)
async def test_the_grammar_that_the_worker_gets(server: Harness, fields, good, bad):
    for answer in (await server.complete(prompt="a", max_tokens=1, n=2, **fields), await server.chat(**fields)):
        assert answer.status_code == 200, answer.text
        grammar = server.params.grammar
        assert grammar is not None
        assert follows(grammar, good)
        assert not follows(grammar, bad)


async def test_text_is_no_constraint(server: Harness):
    assert (await server.complete(prompt="a", max_tokens=1, response_format={"type": "text"})).status_code == 200
    assert server.params.grammar is None


REFUSED = [
    ({"response_format": {"type": "structural_tag", "structures": []}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
        "response_format.json_schema.name",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "foo"}}}},
        "response_format.json_schema.schema",
    ),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a("}}, "structured_outputs.regex"),
    ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs.regex"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice.0"),
    ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs.grammar"),
    ({"structured_outputs": {"grammar": 'root ::= "a'}}, "structured_outputs.grammar"),
    ({"structured_outputs": {"grammar": "root ::= " + "(" * 5000}}, "structured_outputs.grammar"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": "[1]"}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": {"$ref": "http://localhost/x"}}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": {"enum": []}}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": {"type": "array", "uniqueItems": True}}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": {"description": "x" * 70_000}}}, "structured_outputs.json"),
    ({"structured_outputs": {"json_object": True, "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"json_object": True}, "response_format": {"type": "text"}}, "structured_outputs"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda value: str(value)[:60])
async def test_what_cannot_be_enforced_is_refused_by_name(server: Harness, fields, param):
    for answer in (await server.complete(prompt="a", **fields), await server.chat(**fields)):
        message = assert_error(answer, 400, param)
        assert len(message) < 1000
    assert not server.worker.requests


async def test_keywords_that_cannot_be_enforced_pass_where_the_client_says_so(server: Harness):
    schema = {"name": "x", "schema": {"type": "array", "uniqueItems": True}, "strict": False}
    answer = await server.complete(
        prompt="a", max_tokens=1, response_format={"type": "json_schema", "json_schema": schema}
    )
    assert answer.status_code == 200
    assert follows(server.params.grammar or "", "[1,1]")


def test_white_space_between_parts_is_none_whatever_the_schema_says():
    grammar = json_schema_grammar({**SCHEMA, "x-guidance": {"whitespace_flexible": True}})
    assert follows(grammar, '{"a":1}')
    assert not follows(grammar, '{"a": 1}')


@pytest.mark.parametrize("choice", ['"', "\\", "\n", "☃ 🙂", "/a+/", "a b", "\x00"])
def test_any_text_can_be_a_choice(choice: str):
    grammar = choice_grammar(["other", choice])
    assert follows(grammar, choice)
    assert not follows(grammar, choice + choice)


def test_many_choices():
    choices = [f"choice {index}" for index in range(4000)]
    assert follows(choice_grammar(choices), choices[-1])


def test_a_notation_is_told_by_its_rules():
    assert follows(context_free_grammar('# a ::= comment\nstart: "x"'), "x")
    assert follows(context_free_grammar('digits ::= [0-9]+\nroot ::= "<" digits ">"'), "<12>")

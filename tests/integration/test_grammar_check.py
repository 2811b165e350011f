"""Grammars that would end a process end the one that is there for it."""

from __future__ import annotations

import asyncio

import pytest
from llguidance import LLMatcher

from amoe.errors import EngineOverloadedError
from amoe.server.grammar_check import MAX_WAITING, GrammarProcess

DEEP = 1500
OVERFLOWING_RULES = "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(2 * DEEP)) + f'r{2 * DEEP}: "a"'
OVERFLOWING_SCHEMA = LLMatcher.grammar_from_json_schema(
    {
        "$defs": {f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(DEEP)}
        | {f"d{DEEP}": {"type": "string"}},
        "$ref": "#/$defs/d0",
    }
)
ENDLESS_SCHEMA = LLMatcher.grammar_from_json_schema({"type": "integer", "multipleOf": 9999999})
SMALL = LLMatcher.grammar_from_regex("a+")


@pytest.mark.parametrize("grammar", [OVERFLOWING_RULES, OVERFLOWING_SCHEMA, ENDLESS_SCHEMA])
async def test_what_kills_the_compiler_is_refused_and_the_next_one_served(grammar: str):
    async with GrammarProcess() as check:
        assert "too complex" in (await check(grammar) or "")
        assert await check(SMALL) is None


async def test_complaints_are_for_users():
    async with GrammarProcess() as check:
        complaint = await check(LLMatcher.grammar_from_regex("a("))
        assert "unclosed group" in (complaint or "")
        assert await check(LLMatcher.grammar_from_regex("a(")) == complaint  # remembered
        assert await check('start: "☃"') is None


async def test_a_question_that_nobody_waits_for_spoils_no_other():
    async with GrammarProcess() as check:
        assert await check(SMALL) is None
        asked = asyncio.create_task(check(ENDLESS_SCHEMA))
        await asyncio.sleep(0.05)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        answers = await asyncio.gather(*(check(f'start: "{n}"') for n in range(4)), check("start: nothing"))
        assert answers[:4] == [None] * 4
        assert "nothing" in (answers[4] or "")


async def test_a_crowd_of_grammars_is_refused():
    async with GrammarProcess() as check:
        asked = (check(f'start: "{n}"') for n in range(MAX_WAITING + 2))
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert answers[:MAX_WAITING] == [None] * MAX_WAITING
        assert [type(answer) for answer in answers[MAX_WAITING:]] == [EngineOverloadedError] * 2
        assert await check('start: "later"') is None

"""One grammar for a whole answer: thoughts that are free, then tool calls, or the structure that was asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from llguidance import LLMatcher

from amoe.server.parsers.formats import ToolFormat
from amoe.server.parsers.reasoning import ReasoningFormat
from amoe.server.tools import ToolPlan, argument_rules, call_rules, mark

ANSWER = "answer"  # the name of the grammar of `response_format` within a larger one
_SPACE = r"/[ \n]{0,2}/"


def chat_grammar(
    plan: ToolPlan,
    format_: ToolFormat,
    answer: str | None,
    reasoning: ReasoningFormat | None,
    inside: bool | None,
    special_ids: Mapping[str, int],
) -> str | None:
    """The grammar of an answer, as llguidance serialises it; None: any text will do.

    Args:
        answer: the grammar that the request asks for.
        reasoning: how the model marks its thoughts; None: it does not think.
        inside: where the answer starts, as `ReasoningFormat.is_inside` says.
        special_ids: marks that are special tokens of the model.
    """
    thinks = reasoning is not None and inside is not False
    if plan.mode == "auto" and answer is None:
        return LLMatcher.grammar_from_lark(_strict_rules(plan, special_ids)) if plan.strict else None
    if plan.mode == "none" and (answer is None or not thinks):
        return answer
    body, rules = f"@{ANSWER}", ""
    if plan.mode != "none":
        body = "calls" if plan.is_forced else f"calls | @{ANSWER}"
        rules = call_rules(plan, format_, special_ids)
    if thinks and reasoning is not None:
        prefix, think_rules = _thinking(reasoning, inside, special_ids)
        lark = f"start: {prefix} body\nbody: {body}\n{rules}{think_rules}"
    else:
        lark = f"start: {body}\n{rules}"
    if plan.is_forced or answer is None:
        return LLMatcher.grammar_from_lark(lark)
    return _with_answer(lark, answer)


def _thinking(reasoning: ReasoningFormat, inside: bool | None, special_ids: Mapping[str, int]) -> tuple[str, str]:
    """What stands before the answer, and its rules: thoughts are any text up to their end mark."""
    start, end = mark(reasoning.start, special_ids), mark(reasoning.end, special_ids)
    if reasoning.end in special_ids:
        thoughts = f"thoughts: /(?s:.*)/ {end}\n"
    else:
        thoughts = f"thoughts[lazy]: /(?s:.*){_escaped(reasoning.end)}/\n"
    prefix = f"thoughts {_SPACE}" if inside else f"({start} thoughts {_SPACE})?"
    return prefix, thoughts


def _strict_rules(plan: ToolPlan, special_ids: Mapping[str, int]) -> str:
    """Any text; but where a call of a strict function has begun, its arguments follow the schema."""
    rules, pieces = "", []
    for number, (_, function) in enumerate(plan.strict):
        head = rf'\{{\s*"name"\s*:\s*"{_escaped(function.name)}"\s*,\s*"(arguments|parameters)"\s*:'
        rules += f"head_{number}[lazy]: /(?s:.*){head}/\ntag_{number}: head_{number} {_SPACE} arguments_{number}\n"
        pieces.append(f"tag_{number}")
    if special_ids:  # which are part of no text
        rules += f"marked: /(?s:.*)/ <[{','.join(str(token_id) for token_id in special_ids.values())}]>\n"
        pieces.append("marked")
    return f"start: ({' | '.join(pieces)})* tail\ntail: /(?s:.*)/\n{rules}{argument_rules(plan.strict)}"


def _with_answer(lark: str, answer: str) -> str:
    """`lark`, whose `@answer` is the grammar `answer`."""
    grammars = json.loads(_serialised(answer))["grammars"]
    grammars[0]["name"] = ANSWER
    return json.dumps({"grammars": [{"lark_grammar": lark}, *grammars]})


def _serialised(grammar: str) -> str:
    """A grammar that is bare Lark, as llguidance leaves it, in the form that can name it."""
    return grammar if grammar.lstrip().startswith("{") else json.dumps({"grammars": [{"lark_grammar": grammar}]})


def _escaped(text: str) -> str:
    return _slashed(re.escape(text))


def _slashed(pattern: str) -> str:
    """A regular expression between slashes."""
    return pattern.replace("/", r"\/")

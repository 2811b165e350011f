"""The ways to write tool calls that there are: how each is read, enforced, explained, and written down again.

Grammars are pieces of llguidance's Lark notation. Marks may be single tokens of the vocabulary there, so that they come
from the caller, as `mark(text)`.
"""

from __future__ import annotations

import json
import secrets
import string
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from amoe.server.parsers.base import ToolParser
from amoe.server.parsers.hermes import CLOSE, OPEN, HermesParser
from amoe.server.parsers.mistral import MARKER, MistralParser
from amoe.server.parsers.plain_json import PlainJsonParser

MAX_ENFORCED_CALLS = 16  # of one answer: a small model could go on for ever
MISTRAL_ID_CHARS = 9  # Mistral's templates refuse ids of any other length

FormatName = Literal["hermes", "mistral", "json"]
Mark = Callable[[str], str]


def _openai_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _mistral_id() -> str:
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(MISTRAL_ID_CHARS))


def _hermes_rules(mark: Mark) -> str:
    return (
        f'block: {mark(OPEN)} "\\n" call "\\n" {mark(CLOSE)}\nmany: block ("\\n" block)~0..{MAX_ENFORCED_CALLS - 1}\n'
    )


def _mistral_rules(mark: Mark) -> str:
    more = f'(", " call)~0..{MAX_ENFORCED_CALLS - 1}'
    return f'block: {mark(MARKER)} "[" call "]"\nmany: {mark(MARKER)} "[" call {more} "]"\n'


def _json_rules(_: Mark) -> str:
    return f'block: call\nmany: call | "[" call (", " call)~1..{MAX_ENFORCED_CALLS - 1} "]"\n'


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolFormat:
    """One way to write calls.

    Attributes:
        marks: texts that may be special tokens, which must stay in the text for the parser to see.
        checks_names: only functions that there are can be called: nothing else tells a call from other JSON.
        rules: Lark rules `block` (one call) and `many`, over a rule `call` (the JSON object of one call).
        before, after: what stands around one call in a conversation.
    """

    name: FormatName
    marks: tuple[str, ...]
    checks_names: bool
    rules: Callable[[Mark], str]
    before: str
    after: str
    make_parser: Callable[[Callable[[], str], Collection[str] | None], ToolParser]
    new_id: Callable[[], str]

    def parser(self, names: Collection[str]) -> ToolParser:
        """A parser for one answer.

        Args:
            names: functions that there are.
        """
        return self.make_parser(self.new_id, names if self.checks_names else None)

    def write(self, calls: Sequence[tuple[str, Any]]) -> str:
        """Calls, each a name and its arguments, as the model would have written them."""
        lines = [json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False) for name, arguments in calls]
        return "\n".join(f"{self.before}{line}{self.after}" for line in lines)

    def explain(self, tools: Sequence[dict[str, Any]]) -> str:
        """What a model is told whose template says nothing about tools."""
        functions = [json.dumps(tool["function"], ensure_ascii=False) for tool in tools]
        example = self.write([("NAME", {})]).replace("{}", "{...}")
        return "\n".join(["Functions that you can call:", *functions, f"To call one, answer only: {example}"])


TOOL_FORMATS: dict[FormatName, ToolFormat] = {
    "hermes": ToolFormat(
        name="hermes",
        marks=(OPEN, CLOSE),
        checks_names=False,
        rules=_hermes_rules,
        before=OPEN + "\n",
        after="\n" + CLOSE,
        make_parser=HermesParser,
        new_id=_openai_id,
    ),
    "mistral": ToolFormat(
        name="mistral",
        marks=(MARKER, "[ARGS]", "[CALL_ID]"),
        checks_names=False,
        rules=_mistral_rules,
        before=MARKER + "[",
        after="]",
        make_parser=MistralParser,
        new_id=_mistral_id,
    ),
    "json": ToolFormat(
        name="json",
        marks=(),
        checks_names=True,
        rules=_json_rules,
        before="",
        after="",
        make_parser=PlainJsonParser,
        new_id=_openai_id,
    ),
}


def format_for(template: str) -> ToolFormat:
    """The format of a model with this chat template: the one whose marks the template knows, else plain JSON."""
    for name in ("hermes", "mistral"):
        if TOOL_FORMATS[name].marks[0] in template:
            return TOOL_FORMATS[name]
    return TOOL_FORMATS["json"]

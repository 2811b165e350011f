"""Compiles the grammars of users before they reach a worker."""

from __future__ import annotations

import asyncio
import re
from typing import Protocol

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MAX_COMPLAINT_CHARS = 400

_SPACES = re.compile(r"\s+")
_UNSATISFIABLE = "NoExtension"  # how llguidance says that there is no text at all


class GrammarCheck(Protocol):
    """Says what is wrong with a grammar."""

    async def __call__(self, grammar: str) -> str | None:
        """The complaint, fit for a user; None: it compiles, and some text follows it."""
        ...


def complaint_about(grammar: str) -> str | None:
    """Compile `grammar` here and now, over single bytes instead of a model's tokens, and take its first step."""
    limits = LLParserLimits(verbose_errors=False)
    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return _readable(matcher.get_error()) if matcher.is_error() else None


def _readable(complaint: str) -> str:
    if complaint.startswith(_UNSATISFIABLE):
        return "no text follows it"
    text = _SPACES.sub(" ", complaint.replace("<non-verbose/>", "")).strip()
    return text if len(text) <= MAX_COMPLAINT_CHARS else text[:MAX_COMPLAINT_CHARS] + "..."


async def check_in_thread(grammar: str) -> str | None:
    """A `GrammarCheck` without a process of its own: for tests, and for grammars of trusted users."""
    return await asyncio.to_thread(complaint_about, grammar)

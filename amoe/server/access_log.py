"""Lines about requests: one when a request has ended, and on demand one when the engine takes it.

Nothing that a user sends can begin a new line, or hide a part of one: `amoe.logs` escapes what does not print. Prompts
are logged only as far as `--max-log-len` says; API keys never.
"""

from __future__ import annotations

import logging
from dataclasses import MISSING, fields
from typing import Any

from amoe.engine.tokenizer import Tokenizer
from amoe.server.request_record import RequestRecord, as_fields
from amoe.types import SamplingParams

logger = logging.getLogger("amoe.request")

PROBES = frozenset({"/health", "/ping", "/metrics", "/live", "/admin/cluster"})

_SECRET_PARAMS = ("cache_salt",)


class AccessLog:
    """A line at the end of each request. An observer of `RequestScope`."""

    def began(self, record: RequestRecord) -> None:
        """Nothing yet."""

    def ended(self, record: RequestRecord) -> None:
        """Probes, and pages that watch, come every few seconds: they are told only to who wants to know everything."""
        level = logging.DEBUG if record.path in PROBES else logging.INFO
        if logger.isEnabledFor(level):
            logger.log(level, "request ended", extra={"fields": as_fields(record)})


class RequestLog:
    """A line when the engine takes a request: its parameters, and the beginning of its prompts. An observer.

    Args:
        max_chars: of each prompt.
    """

    def __init__(self, tokenizer: Tokenizer, max_chars: int) -> None:
        self._tokenizer = tokenizer
        self._max_chars = max_chars

    def began(self, record: RequestRecord) -> None:
        """Listen to what comes of it."""
        record.on_start = self._on_start

    def ended(self, record: RequestRecord) -> None:
        """`AccessLog` says that."""

    def _on_start(self, record: RequestRecord) -> None:
        extra: dict[str, Any] = {
            "request_id": record.request_id,
            "model": record.model,
            "num_sequences": len(record.starts),
            "prompt_tokens": record.num_prompt_tokens,
        }
        extra |= changed_params(record.starts[0][1])
        if self._max_chars:
            # A token may be less than a character, so the first tokens may be a few characters too few.
            heads = [prompt[: self._max_chars] for prompt, _ in record.starts[:8]]
            extra["prompts"] = [self._tokenizer.decode(list(head), False)[: self._max_chars] for head in heads]
        logger.info("request admitted", extra={"fields": extra})


def changed_params(params: SamplingParams) -> dict[str, Any]:
    """The parameters that are not at their defaults; of a large one, its size."""
    changed = {}
    for item in fields(params):
        value = getattr(params, item.name)
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        if value == default or item.name in _SECRET_PARAMS:
            continue
        is_large = isinstance(value, str | tuple) and len(value) > 16
        changed[item.name] = f"<{len(value)} entries>" if is_large else value
    return changed

"""What is known of one HTTP request, from its first byte to its last: for logs, traces and response ids."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from amoe.engine.async_generation import Generation
from amoe.types import SamplingParams

Starts = Sequence[tuple[Sequence[int], SamplingParams]]

MAX_ERROR_CHARS = 200

_GOOD_ID = re.compile(r"[!-~]{1,256}")


@dataclass(slots=True)
class RequestRecord:
    """One request.

    Attributes:
        request_id: the client's own (`X-Request-Id`), or a new one.
        method, path: as sent.
        began_s, began_ns: of the monotonic clock, and Unix time.
        headers: those that a tracer reads.
        status: of the response; None until it has begun.
        error: what the client has been told went wrong, on one line of at most `MAX_ERROR_CHARS`; None: nothing.
        client: address that the request came from; None: a Unix socket.
        handler: template of the route that it has reached; None: none.
        starts, generations: the sequences that the engine has admitted for it.
        model: the served name that it meant.
        on_start: called with this record when sequences have been admitted.
    """

    request_id: str
    method: str
    path: str
    began_s: float = field(default_factory=time.monotonic)
    began_ns: int = field(default_factory=time.time_ns)
    headers: dict[str, str] = field(default_factory=dict)
    status: int | None = None
    error: str | None = None
    client: str | None = None
    handler: str | None = None
    starts: list[tuple[Sequence[int], SamplingParams]] = field(default_factory=list)
    generations: list[Generation] = field(default_factory=list)
    model: str | None = None
    on_start: Callable[[RequestRecord], None] | None = None

    def started(self, starts: Starts, generations: Sequence[Generation]) -> None:
        """The engine has admitted these sequences."""
        self.starts += starts
        self.generations += generations
        if self.on_start is not None:
            self.on_start(self)

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts; the choices of one share theirs."""
        total, last = 0, None
        for prompt, _ in self.starts:
            total += len(prompt) if prompt is not last else 0
            last = prompt
        return total

    @property
    def num_generated_tokens(self) -> int:
        """Of all sequences."""
        return sum(generation.state.num_generated_tokens for generation in self.generations)

    @property
    def finish_reasons(self) -> list[str]:
        """Of the sequences that have ended, each reason once."""
        return sorted({g.finish_reason for g in self.generations if g.finish_reason is not None})

    @property
    def ttft_s(self) -> float | None:
        """From the request's arrival to its first token."""
        firsts = [g.first_token_at for g in self.generations if g.first_token_at is not None]
        return min(firsts) - self.began_s if firsts else None


_current: ContextVar[RequestRecord | None] = ContextVar("amoe_request", default=None)


def current_record() -> RequestRecord | None:
    """The request that this task serves."""
    return _current.get()


def enter_record(record: RequestRecord) -> None:
    """This task, and those that it will start, serve `record`."""
    _current.set(record)


def note_error(message: str) -> None:
    """The client of the request that this task serves is told that `message` went wrong."""
    if (record := _current.get()) is not None:
        record.error = " ".join(message.split())[:MAX_ERROR_CHARS]


def request_id_of(header: bytes | None) -> str:
    """The client's id of a request, or a new one where there is none, or one that does not belong into a log."""
    text = (header or b"").decode("latin-1")
    return text if _GOOD_ID.fullmatch(text) else uuid.uuid4().hex


def new_id(prefix: str, request_id: str | None = None) -> str:
    """Id of a response: the body's `request_id`, else that of the HTTP request, which its headers and logs have too."""
    record = _current.get()
    return f"{prefix}-{request_id or (uuid.uuid4().hex if record is None else record.request_id)}"


def _trouble(record: RequestRecord) -> dict[str, Any]:
    """Why a request went wrong, and who sent it. A stream may break after a status of 200."""
    if record.error is None and record.status is not None and record.status < 400:
        return {}
    trouble = {"error": record.error, "client": record.client}
    return {name: value for name, value in trouble.items() if value is not None}


def as_fields(record: RequestRecord) -> dict[str, Any]:
    """What a log line tells of a request that has ended."""
    fields: dict[str, Any] = {
        "method": record.method,
        "path": record.path,
        "status": 499 if record.status is None else record.status,  # nginx's number for a client that has gone
        "request_id": record.request_id,
        "seconds": round(time.monotonic() - record.began_s, 4),
    } | _trouble(record)
    if record.generations:
        queue_s = max((g.queue_s for g in record.generations if g.queue_s is not None), default=None)
        more = {
            "prompt_tokens": record.num_prompt_tokens,
            "generated_tokens": record.num_generated_tokens,
            "finish_reason": ",".join(record.finish_reasons) or None,
            "ttft_s": record.ttft_s,
            "queue_s": queue_s,
        }
        fields |= {k: round(v, 4) if isinstance(v, float) else v for k, v in more.items() if v is not None}
    return fields

"""One response on its way: drives the conversation, and hands on what the assembler makes of it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from amoe.server.conversation import ChatJob, close_all
from amoe.server.responses.assembler import ResponseAssembler
from amoe.server.responses.output import Event
from amoe.server.responses.render import response_usage
from amoe.server.streaming import UsageCounter


class ResponseRun:
    """Works on one response, once.

    Attributes:
        assembler: has the response, at any time.
        job: the conversation.
    """

    def __init__(self, job: ChatJob, assembler: ResponseAssembler) -> None:
        self.assembler = assembler
        self.job = job

    async def events(self) -> AsyncGenerator[Event]:
        """All events, in order. An error is among them, not raised. Leaving the iteration frees the sequence."""
        try:
            for event in self.assembler.begin():
                yield event
            async with contextlib.aclosing(self._answer()) as events:
                async for event in events:
                    yield event
        except Exception as error:
            for event in self.assembler.fail(error):
                yield event
        finally:
            close_all(self.job.generations)

    async def _answer(self) -> AsyncGenerator[Event]:
        usage = UsageCounter(1, 1)
        finish_reason: str | None = None
        thoughts = 0
        async with contextlib.aclosing(self.job.deltas()) as deltas:
            async for delta in deltas:
                usage.update(delta.index, delta.raw)
                finish_reason = delta.finish_reason or finish_reason
                thoughts = delta.reasoning_tokens
                for event in self.assembler.push(delta):
                    yield event
        for event in self.assembler.finish(finish_reason, response_usage(usage.as_json(), thoughts)):
            yield event

    async def complete(self) -> dict[str, Any]:
        """The whole response.

        Raises:
            AmoeError: what broke it off.
        """
        async with contextlib.aclosing(self.events()) as events:
            async for _ in events:
                pass
        if self.assembler.error is not None:
            raise self.assembler.error
        return self.assembler.body

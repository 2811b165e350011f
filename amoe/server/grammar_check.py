"""Compiles the grammars of users before they reach a worker, in a process that may fail.

A hostile grammar overflows the compiler's stack or never ends: that must cost neither the server nor a worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import sys
from collections import OrderedDict
from typing import Protocol

from amoe.errors import AmoeError, EngineOverloadedError
from amoe.server import grammar_child

START_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 60.0  # a process that is not run at all; one that computes is ended by `grammar_child` itself
MAX_REMEMBERED = 256
RETRY_AFTER_S = 5
MAX_WAITING = 32  # questions, each of up to two seconds: who comes later is told so at once


class GrammarCheck(Protocol):
    """Says what is wrong with a grammar."""

    async def __call__(self, grammar: str) -> str | None:
        """The complaint, fit for a user; None: it compiles, and some text follows it."""
        ...


async def check_in_thread(grammar: str) -> str | None:
    """A `GrammarCheck` that takes the risk, for tests that start no process."""
    return await asyncio.to_thread(grammar_child.complaint_about, grammar)


class GrammarProcess:
    """A `GrammarCheck` that compiles in a child process: started for the first grammar, and again after one killed it.

    One grammar at a time; what became of the last ones is remembered. To be entered, so that it ends its child.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._child: asyncio.subprocess.Process | None = None
        self._num_asking = 0
        self._remembered: OrderedDict[bytes, str | None] = OrderedDict()  # by digest: a grammar may have megabytes

    async def __aenter__(self) -> GrammarProcess:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def __call__(self, grammar: str) -> str | None:
        key = hashlib.sha256(grammar.encode("utf-8", "surrogatepass")).digest()
        if key not in self._remembered:
            complaint = await self._ask_in_turn(grammar)
            self._remembered[key] = complaint
            while len(self._remembered) > MAX_REMEMBERED:
                self._remembered.popitem(last=False)
            return complaint
        self._remembered.move_to_end(key)
        return self._remembered[key]

    async def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()

    async def _ask_in_turn(self, grammar: str) -> str | None:
        if self._num_asking >= MAX_WAITING:
            raise EngineOverloadedError("too many grammars wait to be compiled; try again later", RETRY_AFTER_S)
        self._num_asking += 1
        try:
            async with self._lock:
                return await self._ask(grammar)
        finally:
            self._num_asking -= 1

    async def _ask(self, grammar: str) -> str | None:
        try:
            child = self._child or await self._start()
            try:
                return await asyncio.wait_for(_exchange(child, grammar), ANSWER_TIMEOUT_S)
            except (OSError, EOFError, TimeoutError):
                await self.close()
                return "it is too complex: compiling it takes too much time or memory"
        except BaseException:  # nobody waits for the answer any more: it must not become that of the next question
            await self.close()
            raise

    async def _start(self) -> asyncio.subprocess.Process:
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            grammar_child.__name__,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=grammar_child.MAX_LINE_BYTES,
        )
        self._child = child
        assert child.stdout is not None
        if await asyncio.wait_for(child.stdout.readline(), START_TIMEOUT_S) != grammar_child.READY:
            raise AmoeError("the process that compiles grammars did not start; the server's log says why")
        return child


async def _exchange(child: asyncio.subprocess.Process, grammar: str) -> str | None:
    """One line of JSON each way."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(json.dumps(grammar).encode() + b"\n")
    await child.stdin.drain()
    line = await child.stdout.readline()
    if not line.endswith(b"\n"):
        raise EOFError("the compiling process has gone")
    complaint: str | None = json.loads(line)
    return complaint

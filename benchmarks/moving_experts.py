"""What streams and memory notice while experts of a real model move from one worker to another, and back.

    python -m benchmarks.moving_experts [MODEL] [--dtype D] [--quantization int8] [--moves N] [--json FILE]

One `amoe serve` with real kernels, one attention worker and two expert workers; a closed loop of greedy streams runs
all the time. In turn it is asked for one expert worker (the first one reads and packs what the other one held, which
then ends) and for two (a process is started, gets experts until both have as much to do, and the first one drops them).
Each change is compared with the quiet seconds before it: gaps between the tokens of a stream, and the anonymous memory
of the worker that stays. The start of a process, which takes processors for itself, is not counted to the move. Answers
are compared with those of an undisturbed run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.chaos.server import ChaosServer
from benchmarks.chaos.streams import Answer, Traffic

STAYS = "expert 0"
_QUIET = ("--uvicorn-log-level", "warning", "--disable-uvicorn-access-log")
_SAMPLE_S = 0.02
_SETTLED_S = 1.5  # memory that has not changed for so long will not
_STEADY_MIB = 2.0
_PROMPT_TOKENS = 16

Gaps = tuple[float, float, float]
_HEAD = (
    "| expert workers | start of the process, s | experts moved after, s | memory settled after, s | gaps before, ms "
    "(p50 / p99 / longest) | gaps while moving | memory before, MiB | at most | after |\n" + 9 * "|---" + "|"
)


@dataclass(kw_only=True)
class Change:
    """One change of the number of expert workers. Times are monotonic seconds, memory MiB of the worker that stays.

    Attributes:
        serving: when the new process served, if one was started.
        done: when the server said so.
        settled: when the memory of the worker that stays was what it is afterwards.
        gaps_ms, quiet_gaps_ms: median, 99th percentile and longest, while experts moved and in the seconds before.
    """

    workers: int
    asked: float
    serving: float | None = None
    done: float = 0.0
    settled: float = 0.0
    memory_before: float = 0.0
    memory_peak: float = 0.0
    memory_after: float = 0.0
    gaps_ms: Gaps = (0.0, 0.0, 0.0)
    quiet_gaps_ms: Gaps = (0.0, 0.0, 0.0)

    @property
    def begun(self) -> float:
        """When experts could move."""
        return self.serving or self.asked

    def row(self) -> str:
        """Of the table."""
        quiet, gaps = (" / ".join(f"{ms:.0f}" for ms in item) for item in (self.quiet_gaps_ms, self.gaps_ms))
        start = f"{self.serving - self.asked:.1f}" if self.serving else ""
        memory = " | ".join(f"{mib:,.0f}" for mib in (self.memory_before, self.memory_peak, self.memory_after))
        seconds = f"{self.done - self.begun:.1f} | {self.settled - self.begun:.1f}"
        return f"| {3 - self.workers} to {self.workers} | {start} | {seconds} | {quiet} | {gaps} | {memory} |"


@dataclass
class Streams:
    """A closed loop: each stream asks for the same answer again and again.

    Attributes:
        answers: by stream, in order.
    """

    port: int
    bodies: Sequence[dict[str, Any]]
    answers: list[list[Answer]] = field(default_factory=list)
    is_over: bool = False

    async def run(self) -> None:
        """Until `is_over`."""
        self.answers = [[] for _ in self.bodies]
        await asyncio.gather(*map(self._stream, self.bodies, self.answers))

    async def _stream(self, body: dict[str, Any], answers: list[Answer]) -> None:
        while not self.is_over:
            traffic = Traffic(self.port, [body])
            answers.append(traffic.answers[0])
            await traffic.run()

    def gaps_ms(self, since: float, until: float) -> Gaps:
        """Median, 99th percentile and longest of the gaps between tokens that ended in that time."""
        return gaps_of([answer.times for answers in self.answers for answer in answers], since, until)


def gaps_of(times: Sequence[Sequence[float]], since: float, until: float) -> Gaps:
    """See `Streams.gaps_ms`. `times`: of each answer's tokens, monotonic seconds; what comes together is one token."""
    gaps = [
        1e3 * (after - before)
        for of_answer in times
        for before, after in pairwise(of_answer)
        if since <= after <= until and after > before
    ]
    if not gaps:
        return (0.0, 0.0, 0.0)
    middle, high = np.percentile(gaps, (50, 99)).tolist()
    return (middle, high, max(gaps))


def make_bodies(count: int, max_tokens: int, vocab_size: int) -> list[dict[str, Any]]:
    """Greedy requests with random prompts."""
    draw = random.Random(0)
    common = {
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    prompts = [[draw.randrange(3, vocab_size) for _ in range(_PROMPT_TOKENS)] for _ in range(count)]
    return [common | {"prompt": prompt} for prompt in prompts]


def anonymous_mib(pid: int) -> float:
    """Resident memory that is no file's."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


async def change(server: ChaosServer, workers: int) -> Change:
    """Ask for so many expert workers, and look on."""
    pid = server.pids()[STAYS]
    what = Change(workers=workers, asked=time.monotonic(), memory_before=anonymous_mib(pid))
    asking = asyncio.create_task(asyncio.to_thread(server.admin, "POST", "/admin/scale", {"expert_workers": workers}))
    watching = asyncio.create_task(_until_serving(server, what))
    while not asking.done():
        what.memory_peak = max(what.memory_peak, anonymous_mib(pid))
        await asyncio.sleep(_SAMPLE_S)
    await asking
    what.done = time.monotonic()
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching
    await _settle(pid, what)
    return what


async def _settle(pid: int, what: Change) -> None:
    """What is dropped goes after the answer: until the memory stays what it is."""
    what.settled, what.memory_after = what.done, anonymous_mib(pid)
    while time.monotonic() - what.settled < _SETTLED_S:
        await asyncio.sleep(_SAMPLE_S)
        now = anonymous_mib(pid)
        if abs(now - what.memory_after) > _STEADY_MIB:
            what.settled, what.memory_after = time.monotonic(), now


async def _until_serving(server: ChaosServer, what: Change) -> None:
    while what.workers > 1:
        lives = await asyncio.to_thread(server.lives)
        if lives.get("expert 1", ("", 0))[0] == "serving":
            what.serving = time.monotonic()
            return
        await asyncio.sleep(0.1)


async def measure(server: ChaosServer, options: argparse.Namespace) -> dict[str, Any]:
    """An undisturbed run, then all changes under load."""
    bodies = make_bodies(options.streams, options.tokens, options.vocab)
    oracle = await Traffic(server.port, bodies).run()
    streams = Streams(server.port, bodies)
    print(_HEAD, flush=True)
    running = asyncio.create_task(streams.run())
    changes = []
    for number in range(options.moves):
        await asyncio.sleep(options.seconds)
        what = await change(server, 1 + number % 2)
        what.quiet_gaps_ms = streams.gaps_ms(what.asked - options.seconds, what.asked)
        what.gaps_ms = streams.gaps_ms(what.begun, what.settled)
        changes.append(what)
        print(what.row(), flush=True)
    await asyncio.sleep(options.seconds)
    streams.is_over = True
    await running
    complaints = [a.complaint(options.tokens) for answers in streams.answers for a in answers]
    same = [a.token_ids == o.token_ids for answers, o in zip(streams.answers, oracle, strict=True) for a in answers]
    return {
        "changes": [asdict(item) for item in changes],
        "answers": len(same),
        "failed": sum(map(bool, complaints)),
        "identical": sum(same),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moving_experts", description=__doc__)
    parser.add_argument("model", nargs="?", default=None)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization", default=None)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=200, help="of each answer")
    parser.add_argument("--vocab", type=int, default=4000, help="prompts are made of ids below this")
    parser.add_argument("--moves", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=5.0, help="of quiet before each change")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(arguments)
    flags = [*([options.model] if options.model else []), "--expert-workers", "2", "--dtype", options.dtype]
    flags += ["--quantization", options.quantization] if options.quantization else []
    with tempfile.TemporaryDirectory() as directory, ChaosServer(Path(directory), *flags, *_QUIET) as server:
        result = asyncio.run(measure(server, options))
    print(f"{result['answers']} answers, {result['failed']} failed, {result['identical']} as undisturbed")
    if options.json:
        options.json.write_text(json.dumps(vars(options) | result, default=str, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

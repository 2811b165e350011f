"""A server that gets ten times what it can do, for a minute: who is refused, how fast, and what the others notice.

    python -m benchmarks.overload [--factor X] [--seconds S] [--json FILE] [-- FLAGS OF amoe serve]

Three phases against one `amoe serve` of the built-in model. *Full*: a closed loop that keeps every place of a running
sequence taken and nobody waiting; its rate is what the server can sustain. *Overload*: requests come at random
(Poisson) at `factor` times that rate, each on a connection of its own, as from clients that do not know of each other.
*After*: the closed loop again. All requests stream; ITL is the time between two events of one stream.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil

TIMEOUT_S = 120.0
EVENT = b'"choices":[{'


@dataclass
class Answer:
    """What became of one request. Times are monotonic seconds; `status` 0: no answer (timeout, connection lost)."""

    sent: float
    status: int = 0
    retry_after: bool = False
    ended: float = 0.0
    events: list[float] = field(default_factory=list)


@dataclass
class Phase:
    """Figures of one phase; memory in MiB (resident, server and workers), of its start, greatest and end."""

    name: str
    seconds: float
    offered_per_s: float
    completed_per_s: float
    statuses: dict[str, int]
    refusals_with_retry_after: int
    refusal_ms_p50: float
    refusal_ms_p99: float
    ttft_ms_p50: float
    ttft_ms_p99: float
    itl_ms_p50: float
    itl_ms_p99: float
    unhealthy_probes: int
    memory_mib: tuple[float, float, float]


class Client:
    """Streams completions over plain sockets: a client library would take the cores that the server needs."""

    def __init__(self, port: int, prompt: str, max_tokens: int) -> None:
        self._port = port
        body = json.dumps(
            {"prompt": prompt, "max_tokens": max_tokens, "stream": True, "temperature": 0, "ignore_eos": True}
        ).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
        self._request = head.encode() + b"Content-Type: application/json\r\n\r\n" + body

    async def ask(self) -> Answer:
        """One request, to its end."""
        answer = Answer(time.monotonic())
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._read(answer)
        except (TimeoutError, OSError):
            answer.status = 0
        answer.ended = time.monotonic()
        return answer

    async def _read(self, answer: Answer) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            writer.write(self._request)
            head = await reader.readuntil(b"\r\n\r\n")
            answer.status = int(head.split(b" ", 2)[1])
            answer.retry_after = b"retry-after:" in head.lower()
            while data := await reader.read(1 << 16):
                answer.events += [time.monotonic()] * data.count(EVENT)
        finally:
            writer.close()


async def closed_loop(client: Client, concurrency: int, seconds: float) -> list[Answer]:
    """`concurrency` requests at any time, for `seconds`."""
    end = time.monotonic() + seconds

    async def one() -> list[Answer]:
        answers = []
        while time.monotonic() < end:
            answers.append(await client.ask())
        return answers

    return [answer for answers in await asyncio.gather(*(one() for _ in range(concurrency))) for answer in answers]


async def open_loop(client: Client, rate: float, seconds: float) -> list[Answer]:
    """Poisson arrivals, whatever becomes of the others."""
    draw = random.Random(0)
    tasks: list[asyncio.Task[Answer]] = []
    start, at = time.monotonic(), 0.0
    while (at := at + draw.expovariate(rate)) < seconds:
        await asyncio.sleep(max(0.0, start + at - time.monotonic()))
        tasks.append(asyncio.create_task(client.ask()))
    return list(await asyncio.gather(*tasks))


class Observer:
    """Watches memory and health beside a phase."""

    def __init__(self, pid: int, port: int) -> None:
        server = psutil.Process(pid)
        self._processes = [server, *server.children(recursive=True)]
        self._port = port
        self.memory: list[float] = []
        self.unhealthy = 0

    def _resident_mib(self) -> float:
        return sum(process.memory_info().rss for process in self._processes) / 2**20

    async def watch(self) -> None:
        """Until cancelled."""
        while True:
            self.memory.append(self._resident_mib())
            try:
                async with asyncio.timeout(5.0):
                    reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
                    writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                    self.unhealthy += b" 200 " not in await reader.readline()
                    writer.close()
            except (TimeoutError, OSError):
                self.unhealthy += 1
            await asyncio.sleep(1.0)


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    if not values:
        return float("nan"), float("nan")
    p50, p99 = np.percentile(np.array(values) * 1e3, [50, 99])
    return float(p50), float(p99)


async def run_phase(name: str, pid: int, port: int, load: Any) -> Phase:
    """Put `load` (a coroutine of answers) on the server, and sum up."""
    observer = Observer(pid, port)
    watching = asyncio.create_task(observer.watch())
    start = time.monotonic()
    answers: list[Answer] = await load
    seconds = time.monotonic() - start
    watching.cancel()
    served = [answer for answer in answers if answer.status == 200]
    refused = [answer for answer in answers if answer.status == 503]
    gaps = [later - earlier for answer in served for earlier, later in pairwise(answer.events)]
    last = max(answer.sent for answer in answers) - start
    return Phase(
        name,
        seconds,
        len(answers) / max(last, 1e-9),
        len(served) / seconds,
        {str(status): count for status, count in sorted(Counter(answer.status for answer in answers).items())},
        sum(answer.retry_after for answer in refused),
        *_percentiles([answer.ended - answer.sent for answer in refused]),
        *_percentiles([answer.events[0] - answer.sent for answer in served if answer.events]),
        *_percentiles(gaps),
        observer.unhealthy,
        (observer.memory[0], max(observer.memory), observer.memory[-1]),
    )


def start_server(flags: list[str]) -> tuple[subprocess.Popen[str], int]:
    """A server of the built-in model, and its port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "amoe.cli", "serve", "--port", "0", "--uvicorn-log-level", "warning", *flags],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if (match := re.search(r"ready at http://\S+?:(\d+)", line)) is not None:
            return process, int(match[1])
    raise SystemExit("the server did not start")


async def measure(args: argparse.Namespace, pid: int, port: int) -> list[Phase]:
    """The three phases."""
    client = Client(port, args.prompt, args.max_tokens)
    await closed_loop(client, args.max_num_seqs, 5.0)  # warms up
    full = await run_phase("full", pid, port, closed_loop(client, args.max_num_seqs, args.seconds / 2))
    print(f"sustained: {full.completed_per_s:.1f} requests per second", file=sys.stderr)
    rate = args.factor * full.completed_per_s
    overload = await run_phase("overload", pid, port, open_loop(client, rate, args.seconds))
    after = await run_phase("after", pid, port, closed_loop(client, args.max_num_seqs, args.seconds / 2))
    return [full, overload, after]


def table(phases: Sequence[Phase]) -> str:
    """Markdown."""
    lines = [
        "| phase | offered/s | completed/s | answers by status | refusal ms p50 / p99 | TTFT ms p50 / p99 "
        "| ITL ms p50 / p99 | unhealthy | memory MiB start / most / end |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for phase in phases:
        memory = " / ".join(f"{value:.0f}" for value in phase.memory_mib)
        statuses = ", ".join(f"{status}: {count}" for status, count in phase.statuses.items())
        lines.append(
            f"| {phase.name} | {phase.offered_per_s:.1f} | {phase.completed_per_s:.1f} | {statuses} | "
            f"{phase.refusal_ms_p50:.0f} / {phase.refusal_ms_p99:.0f} | "
            f"{phase.ttft_ms_p50:.0f} / {phase.ttft_ms_p99:.0f} | "
            f"{phase.itl_ms_p50:.1f} / {phase.itl_ms_p99:.1f} | {phase.unhealthy_probes} | {memory} |"
        )
    full, overload, after = phases
    lines.append(
        f"\np99 ITL under overload: {overload.itl_ms_p99 / full.itl_ms_p99:.2f} x that of the full server; "
        f"completed: {overload.completed_per_s / full.completed_per_s:.2f} x; "
        f"after: {after.completed_per_s / full.completed_per_s:.2f} x"
    )
    return "\n".join(lines)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factor", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the overload; the closed loops take half of it")
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--prompt", default="def add(a, b):\n    return a + b\n\n\nclass Stack:\n" * 2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("flags", nargs="*", help="of amoe serve")
    args = parser.parse_args()
    process, port = start_server(["--max-num-seqs", str(args.max_num_seqs), *args.flags])
    try:
        phases = asyncio.run(measure(args, process.pid, port))
    finally:
        process.terminate()
        process.wait(60)
    print(table(phases))
    if args.json is not None:
        record = {"date": datetime.now(UTC).isoformat(), "command": sys.argv, "phases": [asdict(p) for p in phases]}
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

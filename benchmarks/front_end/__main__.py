"""What a streamed token costs in the front end: processor time, delay, and how many go through one process.

    python -m benchmarks.front_end [--streams N] [--tokens N] [--rounds N] [--json FILE]

An instant worker gives each of N streams a token per step. *Paced*: a step every 20 ms, so that every token is an event
of its own: processor time of the server process per event, and the delay from the worker's sending to the client's
reading. *Flat out*: no pause between steps; events per second of one server process. (amoe merges what a client or the
process itself is too slow for into one event, so its tokens per second may be higher than its events.)

The kinds of server (see `serve`) take turns within each round; what counts is their ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from benchmarks.front_end.instant_worker import EMITTED, MAX_TOKENS, PERIOD, emission_times

KINDS = ("amoe", "amoe, chat", "pydantic", "echo")
CHAT = "amoe, chat"
PACED_S = 0.02
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Sample:
    """One run of one kind.

    Attributes:
        cpu_us: processor time of the server process per event, microseconds.
        delay_us_p50, delay_us_p99: from the worker's sending a token to the client's reading its event, in streams of
            one token per event.
        events_per_s, tokens_per_s: what the clients got.
    """

    kind: str
    paced: bool
    cpu_us: float
    delay_us_p50: float
    delay_us_p99: float
    events_per_s: float
    tokens_per_s: float


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _server(kind: str, period_s: float, emitted: Path) -> Iterator[tuple[int, int]]:
    """(pid, port) of a server that listens."""
    port = _free_port()
    environment = {**os.environ, PERIOD: str(period_s), EMITTED: str(emitted)}
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.front_end.serve", kind, str(port)],
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        else:
            raise RuntimeError(f"the server of kind {kind} does not listen")
        yield process.pid, port
    finally:
        process.terminate()
        process.wait(20)


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


async def _stream(port: int, number: int, tokens: int, chat: bool, arrivals: list[tuple[int, int, float]]) -> int:
    """Read one stream; appends (request, event, time). Returns the number of events."""
    prompt = {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": [number, 7]}
    body = json.dumps({**prompt, "max_tokens": tokens, "stream": True, "ignore_eos": True}).encode()
    path = "/v1/chat/completions" if chat else "/v1/completions"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
    events, rest = 0, b""
    while data := await reader.read(1 << 16):
        now = time.monotonic()
        rest += data
        for _ in range(rest.count(b'"choices":[{')):
            arrivals.append((number, events, now))
            events += 1
        rest = rest[-11:]  # a marker may be cut; one that is whole has been counted
        if rest.endswith(b'"choices":[{'):
            rest = b""
    writer.close()
    return events


async def _load(port: int, streams: int, tokens: int, chat: bool) -> tuple[list[tuple[int, int, float]], int, float]:
    arrivals: list[tuple[int, int, float]] = []
    start = time.monotonic()
    counts = await asyncio.gather(*(_stream(port, 1 + number, tokens, chat, arrivals) for number in range(streams)))
    return arrivals, sum(counts), time.monotonic() - start


def measure(kind: str, *, paced: bool, streams: int, tokens: int) -> Sample:
    """One run in fresh processes, after a short one that warms them up."""
    with tempfile.TemporaryDirectory() as directory:
        emitted = Path(directory) / "emitted"
        times = emission_times(str(emitted))
        with _server(kind, PACED_S if paced else 0.0, emitted) as (pid, port):
            asyncio.run(_load(port, 4, 32, kind == CHAT))
            before = _cpu_seconds(pid)
            arrivals, events, seconds = asyncio.run(_load(port, streams, tokens, kind == CHAT))
            cpu = _cpu_seconds(pid) - before
        # Of a chat's tokens the worker does not know whose they are, and of an event that holds several tokens
        # nobody can say which: those streams are left out.
        whole = {number for number, count in Counter(number for number, _, _ in arrivals).items() if count == tokens}
        delays = [now - times[number, event] for number, event, now in arrivals if number in whole and kind != CHAT]
        delays_us = 1e6 * np.array(delays or [np.nan])
    return Sample(
        kind,
        paced,
        1e6 * cpu / events,
        float(np.percentile(delays_us, 50)),
        float(np.percentile(delays_us, 99)),
        events / seconds,
        streams * tokens / seconds,
    )


def _table(samples: list[Sample]) -> str:
    lines = [
        "| server | load | CPU µs per event | x echo | delay µs p50 | p99 | events/s | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for paced in (True, False):
        echo = statistics.median(s.cpu_us for s in samples if s.kind == "echo" and s.paced == paced)
        for kind in KINDS:
            own = [s for s in samples if s.kind == kind and s.paced == paced]
            median = [statistics.median(getattr(s, name) for s in own) for name in list(asdict(own[0]))[2:]]
            cpu, p50, p99, events, tokens = median
            load = "paced" if paced else "flat out"
            delay = f"{p50:.0f} | {p99:.0f}" if paced else "- | -"
            lines.append(
                f"| {kind} | {load} | {cpu:.1f} | {cpu / echo:.2f} | {delay} | {events:,.0f} | {tokens:,.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.tokens > MAX_TOKENS:
        parser.error(f"--tokens: at most {MAX_TOKENS}")
    samples = []
    for index in range(args.rounds):
        for paced in (True, False):
            for kind in KINDS:
                print(
                    f"round {index + 1} of {args.rounds}: {kind}, {'paced' if paced else 'flat out'}", file=sys.stderr
                )
                samples.append(measure(kind, paced=paced, streams=args.streams, tokens=args.tokens))
    print(_table(samples))
    if args.json is not None:
        record = {"date": datetime.now(UTC).isoformat(), "command": sys.argv, "samples": [asdict(s) for s in samples]}
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Expert workers added and removed under load, on emulated devices: how soon do tokens wait less?

    python -m benchmarks.scale_out [--device emulated:...] [--streams N] [--seconds S] [--json FILE] [--plot FILE.png]

One `amoe serve` with three attention workers and one expert worker, each on an emulated device (`docs/emulation.md`:
real processes, queues and HTTP; kernels wait for the modelled time, so that more workers are faster on any machine). A
closed loop of streams runs all the time. After S seconds the admin API is asked for three expert workers, S seconds
after they serve for a second replica of the hottest expert, S later for one worker again.

The wait for experts is what a token spends in their queues and steps: from its dispatch to its last answer, at each
layer, as /metrics tells it (`join_wait_seconds`), on the mean over a second.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import numpy as np

from benchmarks.chaos.server import ChaosServer
from benchmarks.chaos.streams import Answer, Traffic, make_load

_SAMPLE_S = 0.5  # as often as workers tell of themselves
_WINDOW_S = 1.0
_PLOT_WINDOW_S = 4.0
_VOCAB_SIZE = 4096
_FLAGS = ("--attention-workers", "3", "--expert-workers", "1", "--max-expert-workers", "3")
_QUIET = ("--uvicorn-log-level", "warning", "--disable-uvicorn-access-log")


@dataclass(frozen=True, slots=True)
class Sample:
    """What /metrics tells at a moment (monotonic seconds), summed over homes and layers since their start."""

    at: float
    waited_s: float
    tokens: float


@dataclass
class Change:
    """Something that was asked of the server. Times are monotonic seconds."""

    title: str
    asked: float
    done: float = 0.0


@dataclass
class Record:
    """All that was seen."""

    began: float = field(default_factory=time.monotonic)
    samples: list[Sample] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """Figures between two changes.

    Attributes:
        title: what was there.
        seconds: its length.
        tokens_per_s: streamed.
        wait_ms: median wait for experts.
        itl_p50_ms, itl_p99_ms: of gaps that ended within it.
    """

    title: str
    seconds: float
    tokens_per_s: float
    wait_ms: float
    itl_p50_ms: float
    itl_p99_ms: float


def sample(server: ChaosServer) -> Sample:
    """Now."""
    metrics = server.metrics()
    return Sample(
        time.monotonic(), metrics.get("join_wait_seconds_sum", 0.0), metrics.get("join_wait_seconds_count", 0.0)
    )


def waits_of(samples: Sequence[Sample]) -> list[tuple[float, float]]:
    """When, and how long tokens had waited in the last `_WINDOW_S` or more; where any ran."""
    waits, first = [], 0
    for last, now in enumerate(samples):
        while first + 1 < last and now.at - samples[first + 1].at >= _WINDOW_S:
            first += 1
        before = samples[first]
        if now.tokens > before.tokens and now.waited_s >= before.waited_s:
            waits.append((now.at, (now.waited_s - before.waited_s) / (now.tokens - before.tokens)))
    return waits


def fell_after(waits: Sequence[tuple[float, float]], change: Change, until: float) -> float | None:
    """Seconds from the question until the wait was nearer to what it became than to what it had been, for good."""
    before = [wait for at, wait in waits if change.asked - 5.0 <= at < change.asked]
    after = [wait for at, wait in waits if change.done + _WINDOW_S <= at < until]
    if not before or not after:
        return None
    middle = (np.median(before) + np.median(after)) / 2
    above = [at for at, wait in waits if change.asked <= at < until and wait > middle]
    return (max(above) if above else change.asked) - change.asked


def phases_of(record: Record, ended: float) -> list[Phase]:
    """Between the changes, and what was there while they were carried out."""
    edges = [("1 expert worker", record.began + 2.0)]  # it fills
    for change in record.changes:
        edges += [(f"... {change.title}", change.asked), (f"{change.title}: done", change.done)]
    waits = waits_of(record.samples)
    gaps = np.array([gap for answer in record.answers for gap in pairwise(answer.times)]).reshape(-1, 2)
    phases = []
    for (title, start), (_, end) in pairwise([*edges, ("", ended)]):
        own = gaps[(gaps[:, 1] >= start) & (gaps[:, 1] < end)]
        lengths = (own[:, 1] - own[:, 0]) * 1e3
        waited = [wait for at, wait in waits if start <= at < end]
        phases.append(
            Phase(
                title=title,
                seconds=end - start,
                tokens_per_s=len(own) / (end - start),
                wait_ms=float(np.median(waited)) * 1e3 if waited else float("nan"),
                itl_p50_ms=float(np.percentile(lengths, 50)) if len(own) else float("nan"),
                itl_p99_ms=float(np.percentile(lengths, 99)) if len(own) else float("nan"),
            )
        )
    return phases


async def closed_loop(
    server: ChaosServer, record: Record, num_streams: int, max_tokens: int, stop: asyncio.Event
) -> None:
    """So many streams at any time, until `stop`."""
    bodies = make_load(4 * num_streams, 0, max_tokens, _VOCAB_SIZE).bodies

    async def one(number: int) -> None:
        while not stop.is_set():
            body = {**bodies[number % len(bodies)], "repetition_penalty": 1.0}
            record.answers += await Traffic(server.port, [body]).run()
            number += num_streams

    await asyncio.gather(*(one(number) for number in range(num_streams)))


async def watch(server: ChaosServer, record: Record) -> None:
    """Sample until cancelled."""
    while True:
        record.samples.append(await asyncio.to_thread(sample, server))
        await asyncio.sleep(_SAMPLE_S)


async def change(record: Record, title: str, ask: Callable[[], object]) -> None:
    """Ask for something and wait until it is done."""
    record.changes.append(Change(title, time.monotonic()))
    await asyncio.to_thread(ask)
    record.changes[-1].done = time.monotonic()


async def measure(server: ChaosServer, num_streams: int, max_tokens: int, seconds: float) -> tuple[Record, float]:
    """Everything, and when it was over."""
    record, stop = Record(), asyncio.Event()
    load = asyncio.ensure_future(closed_loop(server, record, num_streams, max_tokens, stop))
    watching = asyncio.ensure_future(watch(server, record))

    def hot() -> object:
        layer, expert = server.hottest_expert()
        return server.admin("POST", "/admin/replicas", {"layer": layer, "expert": expert, "count": 2})

    await asyncio.sleep(seconds)
    await change(record, "3 expert workers", lambda: server.admin("POST", "/admin/scale", {"expert_workers": 3}))
    await asyncio.sleep(seconds)
    await change(record, "a second replica of the hottest expert", hot)
    await asyncio.sleep(seconds)
    await change(record, "1 expert worker again", lambda: server.admin("POST", "/admin/scale", {"expert_workers": 1}))
    await asyncio.sleep(seconds)
    ended = time.monotonic()
    stop.set()
    await load
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching
    return record, ended


def report(record: Record, ended: float, max_tokens: int) -> str:
    """Markdown."""
    lines = [
        "| phase | s | tokens/s | wait for experts ms | ITL ms p50 | p99 |",
        "|---|---|---|---|---|---|",
        *(
            f"| {p.title} | {p.seconds:.1f} | {p.tokens_per_s:.0f} | {p.wait_ms:.1f} | {p.itl_p50_ms:.0f} | "
            f"{p.itl_p99_ms:.0f} |"
            for p in phases_of(record, ended)
        ),
        "",
    ]
    waits, ends = waits_of(record.samples), [c.asked for c in record.changes[1:]] + [ended]
    for one, until in zip(record.changes, ends, strict=True):
        fell = fell_after(waits, one, until)
        told = "" if fell is None else f"; the wait had changed half of its way after {fell:.1f} s"
        lines.append(f"- {one.title}: done after {one.done - one.asked:.1f} s{told}")
    failed = {answer.complaint(max_tokens) for answer in record.answers} - {""}
    num_failed = sum(bool(answer.complaint(max_tokens)) for answer in record.answers)
    lines.append(
        f"- {len(record.answers)} requests, {num_failed} failed {sorted(failed)[:3] if failed else ''}".rstrip()
    )
    return "\n".join(lines)


def plot(path: Path, record: Record) -> None:
    """Tokens per second and the wait for experts over time, with the changes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 4.5), sharex=True, layout="constrained")
    times = np.array([at for answer in record.answers for at in answer.times]) - record.began
    # Streams that march together get their tokens together: a second in which none came means nothing.
    starts = np.arange(0.0, max(0.0, times.max() - _PLOT_WINDOW_S), 0.25)
    counts = np.array([np.count_nonzero((times >= at) & (times < at + _PLOT_WINDOW_S)) for at in starts])
    top.fill_between(starts + _PLOT_WINDOW_S / 2, counts / _PLOT_WINDOW_S, color="#4878a8", alpha=0.8, linewidth=0)
    top.set_ylabel("tokens per second", fontsize=8)
    waits = np.array(waits_of(record.samples))
    bottom.plot(waits[:, 0] - record.began, waits[:, 1] * 1e3, color="#a05020", linewidth=1.4)
    bottom.set_ylabel("wait for experts, ms", fontsize=8)
    bottom.set_xlabel("seconds", fontsize=8)
    for panel in (top, bottom):
        panel.set_ylim(bottom=0)
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
        for one in record.changes:
            panel.axvspan(one.asked - record.began, one.done - record.began, color="#c0c0c0", alpha=0.5, linewidth=0)
    for one in record.changes:
        at = one.done - record.began
        top.annotate(one.title, (at, 1.0), xycoords=("data", "axes fraction"), fontsize=7, ha="left", va="bottom")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="emulated:h100,slow=300,sigma=1.0,model=olmoe-1b-7b")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=12.0, help="between the changes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as directory,
        ChaosServer(Path(directory), *_FLAGS, "--device", args.device, *_QUIET) as server,
    ):
        record, ended = asyncio.run(measure(server, args.streams, args.max_tokens, args.seconds))
    print(report(record, ended, args.max_tokens))
    if args.plot is not None:
        plot(args.plot, record)
    if args.json is not None:
        result = {"date": datetime.now(UTC).isoformat(), "command": sys.argv}
        phases = [asdict(phase) for phase in phases_of(record, ended)]
        args.json.write_text(json.dumps(result | {"phases": phases}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

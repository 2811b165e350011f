"""Expert workers added and removed under load, on emulated devices: how soon do tokens wait less?

    python -m benchmarks.scale_out [--parts scale,auto,uneven] [--device emulated:...] [--streams N] [--seconds S]
                                   [--json FILE] [--plot FILE.png]

`amoe serve` with attention workers and expert workers, each on an emulated device (`docs/emulation.md`: real processes,
queues and HTTP; kernels wait for the modelled time, so that more workers are faster on any machine). A closed loop of
streams of different lengths runs all the time. Each part has a server of its own:

    scale   one expert worker; then the admin API is asked for three, for a second replica of the hottest expert, for
            one of the hottest expert of every layer, and for one worker again
    auto    `--autoscale-experts 1:3`: one stream at first, then all of them
    uneven  three expert workers, one of which is four times slower, each with a third of the experts; then a rebalance,
            which goes by measured speeds; then replicas of all at each, first unused, then shared by measured speeds
            and by backlog

The *queue age* is the time that a token waits for others at an expert worker, at each layer (what autoscaling goes by,
`amoe.policy.autoscaling`); the *wait for experts* that from its dispatch to its last answer. Both are means over 2 s.
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
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.chaos.server import ChaosServer
from benchmarks.chaos.streams import Traffic
from benchmarks.scale_figures import Change, Record, Sample, phases_of, plot, report

_SAMPLE_S = 0.5  # as often as workers tell of themselves
_VOCAB_SIZE = 4096
_QUIET = ("--uvicorn-log-level", "warning", "--disable-uvicorn-access-log")
_PARTS = ("scale", "auto", "uneven")
_SLOW_RANK, _SLOWNESS = 2, 4  # the second of three expert workers behind one home
_AUTO_TIMEOUT_S = 120.0
_ALL_EXPERTS = 64  # of OLMoE: each of three workers can hold the rest of them beside its third


class Meter:
    """Adds up what each worker counts, so that nothing is lost when one goes."""

    def __init__(self, server: ChaosServer) -> None:
        self._server = server
        self._last: dict[tuple[str, str], float] = {}
        self._sums = dict.fromkeys(_SERIES.values(), 0.0)

    def read(self) -> Sample:
        """Now."""
        now: dict[tuple[str, str], float] = {}
        for name, labels, value in self._server.series():
            if name in _SERIES and labels.get("block", "experts") == "experts":
                now[name, labels["worker"]] = now.get((name, labels["worker"]), 0.0) + value
        for (name, worker), value in now.items():
            self._sums[_SERIES[name]] += max(0.0, value - self._last.get((name, worker), 0.0))
        self._last = now
        return Sample(time.monotonic(), **self._sums)


_SERIES = {
    "expert_wait_token_seconds_total": "age_s",
    "block_batch_size_sum": "tokens",
    "join_wait_seconds_sum": "join_s",
    "join_wait_seconds_count": "joins",
}


class Load:
    """A closed loop of streams, whose answers have different lengths: else all would end, and begin, together."""

    def __init__(self, server: ChaosServer, record: Record, max_tokens: int, prompt_len: int) -> None:
        self._server = server
        self._record = record
        self._max_tokens = max_tokens
        self._prompt_len = prompt_len
        self._streams: list[asyncio.Task[None]] = []
        self._is_over = False

    def grow(self, num_streams: int) -> None:
        """So many there are from now on."""
        first = len(self._streams)
        self._streams += [asyncio.create_task(self._stream(number)) for number in range(first, num_streams)]

    async def end(self) -> None:
        """What has begun comes to its end."""
        self._is_over = True
        await asyncio.gather(*self._streams)

    async def _stream(self, number: int) -> None:
        draw = random.Random(number)
        while not self._is_over:
            num_tokens = draw.randint(max(1, self._max_tokens // 2), self._max_tokens * 3 // 2)
            prompt = [draw.randrange(3, _VOCAB_SIZE) for _ in range(draw.randint(1, 2 * self._prompt_len))]
            body: dict[str, Any] = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0.0}
            body |= {"ignore_eos": True, "stream": True, "return_token_ids": True}
            (answer,) = await Traffic(self._server.port, [body]).run()
            self._record.answers.append(answer)
            if complaint := answer.complaint(num_tokens):
                self._record.complaints.append(complaint)


class Run:
    """One server under load, and what is seen of it.

    Args:
        args: of the command line.
        first: what is there at the beginning.
    """

    def __init__(self, server: ChaosServer, args: argparse.Namespace, first: str) -> None:
        self.server = server
        self.record = Record(first)
        self.seconds: float = args.seconds
        self.load = Load(server, self.record, args.max_tokens, args.prompt_len)

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Samples are taken meanwhile; then the load ends."""
        meter = Meter(self.server)

        async def watch() -> None:
            while True:
                self.record.samples.append(await asyncio.to_thread(meter.read))
                await asyncio.sleep(_SAMPLE_S)

        watching = asyncio.create_task(watch())
        try:
            yield
            self.record.ended = time.monotonic()
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await self.load.end()

    async def change(self, title: str, ask: Callable[[], object]) -> Change:
        """Ask for something, wait until it is done, and let a phase pass."""
        change = Change(title, time.monotonic())
        self.record.changes.append(change)
        await asyncio.to_thread(ask)
        change.done = time.monotonic()
        await asyncio.sleep(self.seconds)
        return change

    def scale(self, count: int) -> object:
        """Ask for so many expert workers."""
        return self.server.admin("POST", "/admin/scale", {"expert_workers": count})

    def replicate(self, places: list[tuple[int, int]]) -> None:
        """Ask for a second replica of each (layer, expert)."""
        for layer, expert in places:
            self.server.admin("POST", "/admin/replicas", {"layer": layer, "expert": expert, "count": 2})

    def hottest(self) -> list[tuple[int, int]]:
        """(layer, expert) of each layer's hottest expert, the hottest of all first."""
        pairs: dict[tuple[int, int], float] = {}
        for name, labels, value in self.server.series():
            if name == "expert_pairs_total":
                place = int(labels["layer"]), int(labels["expert"])
                pairs[place] = pairs.get(place, 0.0) + value
        best: dict[int, tuple[int, int]] = {}
        for place in sorted(pairs, key=pairs.__getitem__):
            best[place[0]] = place
        return sorted(best.values(), key=pairs.__getitem__, reverse=True)


async def scale(run: Run, num_streams: int) -> None:
    """From one worker to three, replicas, and back."""
    async with run.watched():
        run.load.grow(num_streams)
        await asyncio.sleep(run.seconds)
        await run.change("3 expert workers", lambda: run.scale(3))
        await run.change("a second replica of the hottest expert", lambda: run.replicate(run.hottest()[:1]))
        await run.change("a second replica of the hottest of every layer", lambda: run.replicate(run.hottest()))
        await run.change("1 expert worker again", lambda: run.scale(1))


async def auto(run: Run, num_streams: int) -> None:
    """One stream, and then many: nobody asks for a worker."""

    def num_serving() -> int:
        workers = run.server.cluster()["workers"]
        return sum(worker["role"] == "experts" and worker["state"] == "serving" for worker in workers)

    async with run.watched():
        run.load.grow(1)
        await asyncio.sleep(run.seconds)
        change = Change(f"{num_streams} streams", time.monotonic())
        run.record.changes.append(change)
        run.load.grow(num_streams)
        count = 1
        while count < 3 and time.monotonic() < change.asked + _AUTO_TIMEOUT_S:
            await asyncio.sleep(0.1)
            if (now := await asyncio.to_thread(num_serving)) > count:
                count = now
                change.also += f"; {now} workers serve after {time.monotonic() - change.asked:.1f} s"
        change.done = time.monotonic()
        await asyncio.sleep(run.seconds)


async def uneven(run: Run, num_streams: int) -> None:
    """One worker is slow: the same number of experts for everybody, then as the rebalancer places them."""
    async with run.watched():
        run.load.grow(num_streams)
        await asyncio.sleep(run.seconds)
        await run.change("experts placed by measured speeds", lambda: run.server.admin("POST", "/admin/rebalance", {}))


async def steady(run: Run, num_streams: int) -> None:
    """Nothing is asked for."""
    async with run.watched():
        run.load.grow(num_streams)
        await asyncio.sleep(2 * run.seconds)


def runs_of(part: str, device: str) -> list[tuple[str, Callable[[Run, int], Any], str, tuple[str, ...]]]:
    """Of a part: what is there at first, what happens, on which device, and with which flags."""
    one = ("--expert-workers", "1", "--max-expert-workers", "3")
    if part == "scale":
        return [("1 expert worker", scale, device, ("--attention-workers", "3", *one))]
    if part == "auto":
        return [("1 stream", auto, device, ("--attention-workers", "3", *one, "--autoscale-experts", "1:3"))]
    slow = f"{device},straggler={_SLOW_RANK}:{_SLOWNESS}"
    three = ("--attention-workers", "1", "--expert-workers", "3", "--max-expert-workers", "3")
    replicas = (*three, "--redundant-experts", str(_ALL_EXPERTS - _ALL_EXPERTS // 3))
    return [
        ("an even split, one worker 4 times slower", uneven, slow, three),
        ("replicas of all, none of them used", steady, slow, (*replicas, "--steer-interval", "0")),
        ("replicas of all, used by speed and backlog", steady, slow, replicas),
    ]


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(_PARTS), help="some of them")
    parser.add_argument("--device", default="emulated:h100,slow=200,sigma=1.0,model=olmoe-1b-7b")
    parser.add_argument("--streams", type=int, default=48)
    parser.add_argument("--max-tokens", type=int, default=24, help="of an answer, on average")
    parser.add_argument("--prompt-len", type=int, default=16, help="tokens, on average")
    parser.add_argument("--seconds", type=float, default=15.0, help="between the changes")
    parser.add_argument("--fill", type=float, default=4.0, help="seconds at the beginning of which nothing is told")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="of the first part")
    args = parser.parse_args()
    if unknown := set(args.parts.split(",")) - set(_PARTS):
        parser.error(f"--parts: there is no {', '.join(sorted(unknown))}; known: {', '.join(_PARTS)}")
    results: list[dict[str, Any]] = []
    for part in args.parts.split(","):
        for first, happen, device, flags in runs_of(part, args.device):
            with (
                tempfile.TemporaryDirectory() as directory,
                ChaosServer(Path(directory), *flags, "--device", device, *_QUIET) as server,
            ):
                run = Run(server, args, first)
                asyncio.run(happen(run, args.streams))
            print(f"\n### {part}\n\n{report(run.record, args.fill)}", flush=True)
            if args.plot is not None and not results:
                plot(args.plot, run.record)
            results.append({"part": part, "phases": [asdict(p) for p in phases_of(run.record, args.fill)]})
    if args.json is not None:
        result = {"date": datetime.now(UTC).isoformat(), "command": sys.argv, "parts": results}
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Round trips between two processes over each transport, in one run: a DISPATCH goes out, a RESULT of its rows returns.

    python -m benchmarks.transports [--rounds 5] [--trips 500] [--out FILE.md]

Both sides sleep on the transport's descriptor, as idle workers do, and encode and decode as workers do. All transports
are up all the time; rounds go through them and through the sizes in turn. The figures are medians over the rounds of
the rounds' percentiles. The load of the machine and its copy bandwidth are told before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import statistics
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import torch

from amoe.config import TransportName
from amoe.transport.base import Peer
from amoe.transport.opening import Fabric, TransportSpec, create_fabric, open_transport
from amoe.transport.record_size import max_record_bytes
from amoe.types import Batch, BatchKind
from benchmarks.transport_roundtrip import HIDDEN_SIZE, SIZES, TOP_K, copy_bandwidth_gb_s, make_dispatch

TRANSPORTS: tuple[TransportName, ...] = ("shm", "tcp", "distributed")
WARMUP = 50
_PATIENCE_S = 60.0


class Pair:
    """This process (rank 0) and one that answers (rank 1), over one transport."""

    def __init__(self, name: TransportName) -> None:
        record_bytes = max_record_bytes(max(SIZES), HIDDEN_SIZE, TOP_K, 2)
        self._fabric: Fabric = create_fabric(name, num_ranks=2, num_homes=1, max_record_bytes=record_bytes)
        spec = self._fabric.spec_for("127.0.0.1")
        self._child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.transports", "--child", msgspec.json.encode(spec).decode()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=self._fabric.fds(),
        )
        self.end = open_transport(spec, 0)
        assert self._child.stdin is not None and self._child.stdout is not None
        peers = {0: Peer(0, self.end.address), 1: Peer(0, self._child.stdout.readline().strip())}
        self._child.stdin.write(json.dumps(peers) + "\n")
        self._child.stdin.flush()
        self.end.update(peers)
        self._poller = select.poll()
        self._poller.register(self.end.fileno(), select.POLLIN)

    def measure(self, num_tokens: int, trips: int) -> np.ndarray:
        """µs of each round trip."""
        batch = make_dispatch(num_tokens, 0)
        nanoseconds = np.empty(WARMUP + trips)
        for trip in range(WARMUP + trips):
            start = time.perf_counter_ns()
            self.end.send(batch)
            while not self.end.poll():
                if not self._poller.poll(_PATIENCE_S * 1000):
                    raise TimeoutError("no answer")
            nanoseconds[trip] = time.perf_counter_ns() - start
        return nanoseconds[WARMUP:] / 1000

    def close(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait(_PATIENCE_S)
        self.end.close()
        self._fabric.close()


def answer(spec: TransportSpec) -> None:
    """The other process: return every batch until standard input ends."""
    end = open_transport(spec, 1)
    print(end.address, flush=True)
    end.update({int(rank): Peer(*peer) for rank, peer in json.loads(sys.stdin.readline()).items()})
    poller = select.poll()
    for descriptor in (end.fileno(), 0):
        poller.register(descriptor, select.POLLIN)
    while (0, select.POLLHUP) not in poller.poll():
        for batch in end.poll():
            end.send(_result_of(batch))
    end.close()


def _result_of(batch: Batch) -> Batch:
    return Batch(
        BatchKind.RESULT,
        1,
        0,
        batch.layer,
        count=batch.count,
        slots=batch.slots,
        generations=batch.generations,
        payload=batch.payload,
    )


def describe_machine() -> str:
    """How busy it is."""
    return f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, copies {copy_bandwidth_gb_s():.0f} GB/s"


def measure_all(rounds: int, trips: int) -> dict[tuple[TransportName, int], list[tuple[float, float]]]:
    """p50 and p99 in µs of each round, by transport and number of tokens."""
    pairs = {name: Pair(name) for name in TRANSPORTS}
    figures: dict[tuple[TransportName, int], list[tuple[float, float]]] = {}
    try:
        for _ in range(rounds):
            for num_tokens in SIZES:
                for name, pair in pairs.items():
                    p50, p99 = np.percentile(pair.measure(num_tokens, trips), [50, 99])
                    figures.setdefault((name, num_tokens), []).append((float(p50), float(p99)))
    finally:
        for pair in pairs.values():
            pair.close()
    return figures


def table_of(figures: dict[tuple[TransportName, int], list[tuple[float, float]]]) -> str:
    """As Markdown."""
    lines = [
        "| transport | tokens of 2 KB | p50 µs | p99 µs | best round's p50 µs | p50 of shm × |",
        "|---|---|---|---|---|---|",
    ]
    for (name, num_tokens), rounds in figures.items():
        p50, p99 = (statistics.median(values) for values in zip(*rounds, strict=True))
        against = statistics.median(
            one[0] / shm[0] for one, shm in zip(rounds, figures["shm", num_tokens], strict=True)
        )
        best = min(rounds)[0]
        lines.append(f"| {name} | {num_tokens} | {p50:.0f} | {p99:.0f} | {best:.0f} | {against:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--trips", type=int, default=500, help="round trips per round, transport and size")
    parser.add_argument("--out", type=Path, help="write the table there, too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.child:
        answer(msgspec.json.decode(arguments.child, type=TransportSpec))
        return
    before = describe_machine()
    table = table_of(measure_all(arguments.rounds, arguments.trips))
    report = f"Before: {before}. After: {describe_machine()}.\n\n{table}\n"
    print(report)
    if arguments.out:
        arguments.out.write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()

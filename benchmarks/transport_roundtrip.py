"""Round trips between two processes through `ShmTransport`: a DISPATCH goes out, a RESULT of the same rows comes back.

    python benchmarks/transport_roundtrip.py [--rounds 5] [--trips 2000] [--json FILE]

Everything that a worker pays is in it: encoding, the ring, the doorbell, waking, decoding, on both sides. `sleep` waits
for the descriptor as an idle worker does; `spin` polls as a busy one does; `bare` is two processes that ring each
other's eventfd and do nothing else, to tell what the machine costs. Modes and sizes are interleaved in rounds; the
figures are medians over the rounds of the rounds' percentiles, in µs.
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
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import torch

from amoe.transport.shm import ShmTransport
from amoe.transport.shm_fabric import ShmFabric, ShmSpec
from amoe.types import Batch, BatchKind

SIZES = (1, 16, 128)
HIDDEN_SIZE = 1024  # bfloat16: 2 KB per token
TOP_K = 4
MODES = ("sleep", "spin", "bare")
WARMUP = 200
RING_BYTES = 4 << 20
_STOP_LAYER = -1


def make_dispatch(num_tokens: int, layer: int) -> Batch:
    """Tokens from rank 0 to rank 1."""
    return Batch(
        BatchKind.DISPATCH,
        0,
        1,
        layer,
        count=num_tokens,
        slots=np.arange(num_tokens, dtype=np.int32),
        generations=np.zeros(num_tokens, np.int32),
        iterations=np.zeros(num_tokens, np.int32),
        expert_ids=np.zeros((num_tokens, TOP_K), np.int16),
        expert_weights=np.ones((num_tokens, TOP_K), np.float32),
        payload=torch.ones(num_tokens, HIDDEN_SIZE, dtype=torch.bfloat16),
    )


def receiver(transport: ShmTransport, mode: str) -> Callable[[], list[Batch]]:
    """A function that returns the next batches, waiting as `mode` says."""
    poller = select.poll()
    poller.register(transport.fileno(), select.POLLIN)

    def sleep() -> list[Batch]:
        while True:
            poller.poll()
            if batches := transport.poll():
                return batches

    def spin() -> list[Batch]:
        while True:
            if batches := transport.poll():
                return batches

    return sleep if mode == "sleep" else spin


def ring_and_wait(spec: ShmSpec, own: int, other: int) -> None:
    """Wait for rank `own`'s doorbell, then ring the other's."""
    select.select([spec.doorbell_fds[own]], [], [])
    os.eventfd_read(spec.doorbell_fds[own])
    os.eventfd_write(spec.doorbell_fds[other], 1)


def answer(spec: ShmSpec, mode: str) -> None:
    """The other process: return every batch until told to stop."""
    if mode == "bare":
        while True:
            ring_and_wait(spec, 1, 0)
    transport = ShmTransport.attach(spec, 1)
    select.select([transport.fileno()], [], [])
    receive = receiver(transport, mode)
    while True:
        for batch in receive():
            transport.send(
                Batch(
                    BatchKind.RESULT,
                    1,
                    0,
                    batch.layer,
                    batch.wave,
                    batch.epoch,
                    batch.count,
                    batch.slots,
                    batch.generations,
                    payload=batch.payload,
                )
            )
            if batch.layer == _STOP_LAYER:
                return


def measure(mode: str, trips: int) -> dict[int, np.ndarray]:
    """µs of each round trip, by number of tokens."""
    fabric = ShmFabric.create(2, RING_BYTES)
    command = [sys.executable, __file__, "--child", msgspec.json.encode(fabric.spec).decode(), "--mode", mode]
    child = subprocess.Popen(command, pass_fds=fabric.fds())
    transport = fabric.endpoint(0)
    receive = receiver(transport, mode)
    times: dict[int, np.ndarray] = {}
    try:
        if mode == "bare":
            os.eventfd_write(fabric.spec.doorbell_fds[1], 1)
            stamps = np.empty(WARMUP + trips + 1)
            for trip in range(len(stamps)):
                ring_and_wait(fabric.spec, 0, 1)
                stamps[trip] = time.perf_counter_ns()
            return {0: np.diff(stamps)[WARMUP:] / 1000}
        for num_tokens in SIZES:
            batch = make_dispatch(num_tokens, 0)
            transport.send(batch)
            receiver(transport, "sleep")()  # the other process has started; nobody spins while it does
            nanoseconds = np.empty(WARMUP + trips)
            for trip in range(WARMUP + trips):
                start = time.perf_counter_ns()
                transport.send(batch)
                receive()
                nanoseconds[trip] = time.perf_counter_ns() - start
            times[num_tokens] = nanoseconds[WARMUP:] / 1000
        transport.send(make_dispatch(1, _STOP_LAYER))
        child.wait(60)
    finally:
        child.kill()
        child.wait()
        transport.close()
        fabric.close()
    return times


def copy_bandwidth_gb_s() -> float:
    """GB/s of a 64 MB copy by one thread, read and written bytes: tells how busy the machine is."""
    source = np.ones(64 << 20, np.uint8)
    target = np.empty_like(source)
    best = min(_seconds(lambda: np.copyto(target, source)) for _ in range(5))
    return 2 * source.nbytes / best / 1e9


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--trips", type=int, default=2000, help="round trips per round, mode and size")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--mode", choices=MODES, default="sleep", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.child:
        answer(msgspec.json.decode(arguments.child, type=ShmSpec), arguments.mode)
        return
    bandwidth = copy_bandwidth_gb_s()
    percentiles: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for _ in range(arguments.rounds):
        for mode in MODES:
            for num_tokens, times in measure(mode, arguments.trips).items():
                p50, p99 = np.percentile(times, [50, 99])
                percentiles.setdefault((mode, num_tokens), []).append((float(p50), float(p99)))
    rows = [
        {
            "mode": mode,
            "tokens": num_tokens,
            "p50_us": round(statistics.median(p50 for p50, _ in rounds), 1),
            "p99_us": round(statistics.median(p99 for _, p99 in rounds), 1),
            "best_p50_us": round(min(p50 for p50, _ in rounds), 1),
        }
        for (mode, num_tokens), rounds in percentiles.items()
    ]
    print("| mode | tokens of 2 KB | p50 µs | p99 µs | best round's p50 µs |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['mode']} | {row['tokens']} | {row['p50_us']} | {row['p99_us']} | {row['best_p50_us']} |")
    report = {"rounds": arguments.rounds, "trips": arguments.trips, "copy_gb_s": round(bandwidth, 1), "rows": rows}
    print(json.dumps(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

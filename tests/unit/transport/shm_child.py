"""A process that answers every DISPATCH with a RESULT of the same rows, until a batch of layer -1 comes.

Usage: shm_child.py SPEC (msgspec JSON of ShmSpec) RANK
"""

from __future__ import annotations

import select
import sys
from pathlib import Path

import msgspec

sys.path.insert(0, str(Path(__file__).parents[3]))

from amoe.transport.shm import ShmTransport
from amoe.transport.shm_fabric import ShmSpec
from amoe.types import Batch, BatchKind


def main() -> None:
    spec = msgspec.json.decode(sys.argv[1].encode(), type=ShmSpec)
    transport = ShmTransport.attach(spec, int(sys.argv[2]))
    running = True
    while running or not transport.flush():
        select.select([transport.fileno()], [], [])
        transport.flush()
        for batch in transport.poll():
            running = running and batch.layer >= 0
            transport.send(
                Batch(
                    BatchKind.RESULT,
                    transport.rank,
                    batch.src,
                    batch.layer,
                    batch.wave,
                    batch.epoch,
                    batch.count,
                    batch.slots,
                    batch.generations,
                    payload=batch.payload,
                    latest_iteration=batch.latest_iteration,
                )
            )
    transport.close()


main()

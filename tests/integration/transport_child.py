"""Processes that answer every DISPATCH with a RESULT of the same rows.

Usage: transport_child.py SPEC (msgspec JSON of a TransportSpec) FD...

One process imports what there is to import, which takes seconds, and forks a child for each descriptor, a socket. The
child says its process id, and waits for `open RANK INCARNATION`, to which it answers with its address; after that each
line says who the peers are: {"rank": [incarnation, address], ...}. It ends with the other end of its socket.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
from pathlib import Path

import msgspec

sys.path.insert(0, str(Path(__file__).parents[2]))

from amoe.transport.base import Peer, Transport
from amoe.transport.opening import TransportSpec, open_transport
from amoe.types import Batch, BatchKind


def answer_to(batch: Batch) -> Batch:
    return Batch(
        BatchKind.RESULT,
        batch.dst,
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


def serve(transport: Transport, control: socket.socket) -> None:
    lines = b""
    while True:
        ready = select.select([transport.fileno(), control], [], [])[0]
        if control in ready:
            chunk = control.recv(65536)
            if not chunk:
                return
            *complete, lines = (lines + chunk).split(b"\n")
            for line in complete:
                transport.update({int(rank): Peer(*peer) for rank, peer in json.loads(line).items()})
        transport.flush()
        for batch in transport.poll():
            transport.send(answer_to(batch))


def run_child(spec: TransportSpec, control: socket.socket) -> None:
    control.sendall(f"{os.getpid()}\n".encode())
    order = control.recv(100).split()
    if not order:
        return
    transport = open_transport(spec, int(order[1]), int(order[2]))
    control.sendall(f"{transport.address}\n".encode())
    serve(transport, control)
    transport.close()


def main() -> None:
    spec = msgspec.json.decode(sys.argv[1], type=TransportSpec)
    controls = [socket.socket(fileno=int(number)) for number in sys.argv[2:]]
    for control in controls:
        if os.fork() == 0:
            for other in controls:
                if other is not control:
                    other.close()
            run_child(spec, control)
            os._exit(0)
    for control in controls:
        control.close()
    for _ in controls:
        os.wait()


main()

"""The ends of several workers over one transport, in this process and in others, for tests of what all promise."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import torch

from amoe.transport.base import Peer, Transport
from amoe.transport.inproc import InprocFabric
from amoe.transport.opening import Fabric, TransportSpec, create_fabric, open_transport
from amoe.transport.record_size import max_record_bytes
from amoe.types import Batch
from tests.unit.transport.transport_batches import make_batch

HIDDEN_SIZE = 256
TOP_K = 4
MOST_TOKENS = 256
PATIENCE_S = 60.0
CHILD = Path(__file__).parent / "integration" / "transport_child.py"


def batch_of(num_tokens: int, src: int, dst: int, epoch: int = 0, layer: int = 4) -> Batch:
    """The same content for the same arguments."""
    return make_batch(
        num_tokens, src=src, dst=dst, top_k=TOP_K, hidden_size=HIDDEN_SIZE, seed=epoch, epoch=epoch, layer=layer
    )


class Group:
    """Workers of ranks 0, 1, ... Rank 0 is a home, and so are all others unless `num_homes` says less.

    Args:
        kind: `shm`, `tcp`, `distributed`; `split`: the same with payloads beside the records; or `inproc`.
    """

    def __init__(
        self, kind: str, num_ranks: int, *, host: str = "127.0.0.1", num_homes: int = 0, link_timeout_s: float = 2.0
    ) -> None:
        self.kind = kind
        self.host = host
        self.ends: dict[int, Transport] = {}
        self.peers: dict[int, Peer] = {}
        self.children: list[Child] = []
        self._children_process: subprocess.Popen[bytes] | None = None
        most_bytes = max_record_bytes(MOST_TOKENS, HIDDEN_SIZE, TOP_K, 4)
        self._inproc = InprocFabric(num_ranks) if kind == "inproc" else None
        self.fabric: Fabric | None = None
        if self._inproc is None:
            name = "distributed" if kind == "split" else kind
            self.fabric = create_fabric(
                name,
                num_ranks=num_ranks,
                num_homes=num_homes,
                max_record_bytes=most_bytes,
                host=host,
                link_timeout_s=link_timeout_s,
            )

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.children:
            child.kill()
        if self._children_process is not None:
            self._children_process.wait(PATIENCE_S)
        for end in self.ends.values():
            end.close()
        if self.fabric is not None:
            self.fabric.close()
        if self._inproc is not None:
            self._inproc.close()

    def spec(self, host: str | None = None, device: str = "cpu") -> TransportSpec:
        assert self.fabric is not None
        spec = self.fabric.spec_for(host or self.host, device)
        return msgspec.structs.replace(spec, splits_payloads=True) if self.kind == "split" else spec

    def open(self, rank: int, incarnation: int = 0, device: str = "cpu") -> Transport:
        """An end in this process; nobody knows of it before `tell`."""
        if self._inproc is not None:
            end: Transport = self._inproc.endpoint(rank)
        else:
            end = open_transport(self.spec(device=device), rank, incarnation)
        self.ends[rank] = end
        self.peers[rank] = Peer(incarnation, end.address)
        return end

    def open_all(self, num_ranks: int) -> list[Transport]:
        """Ends of all ranks in this process, which know each other."""
        for rank in range(num_ranks):
            self.open(rank)
        self.tell()
        return [self.ends[rank] for rank in range(num_ranks)]

    def start(
        self, count: int, *, host: str | None = None, device: str = "cpu", prefix: tuple[str, ...] = ()
    ) -> list[Child]:
        """Processes that answer what they are sent. Each opens its end when told to, see `Child.open`.

        Args:
            host, device: of theirs.
            prefix: of the command that starts them.
        """
        assert self.fabric is not None and self._children_process is None
        pairs = [socket.socketpair() for _ in range(count)]
        fds = [theirs.fileno() for _, theirs in pairs]
        self._children_process = subprocess.Popen(
            [
                *prefix,
                sys.executable,
                str(CHILD),
                msgspec.json.encode(self.spec(host, device)).decode(),
                *map(str, fds),
            ],
            pass_fds=[*fds, *self.fabric.fds()],
        )
        for ours, theirs in pairs:
            theirs.close()
            self.children.append(Child(ours))
        return list(self.children)

    def tell(self) -> None:
        """All ends, and the children that are open, learn who there is."""
        for end in self.ends.values():
            end.update(self.peers)
        for child in self.children:
            if child.is_alive and self.peers.get(child.rank, -1) == child.peer:
                child.tell(self.peers)


class Child:
    """A process that answers every DISPATCH with a RESULT of the same rows, see `transport_child.py`."""

    def __init__(self, control: socket.socket) -> None:
        control.settimeout(PATIENCE_S)
        self._control = control
        self._lines = control.makefile("r")
        self.pid = int(self._lines.readline())
        self.rank = -1
        self.peer: Peer | None = None
        self.is_alive = True

    def open(self, rank: int, incarnation: int = 0) -> Peer:
        """Have it open its end, and wait until it has."""
        self._control.sendall(f"open {rank} {incarnation}\n".encode())
        address = self._lines.readline()
        assert address.endswith("\n"), "the child has ended"
        self.rank, self.peer = rank, Peer(incarnation, address.strip())
        return self.peer

    def tell(self, peers: dict[int, Peer]) -> None:
        self._control.sendall((json.dumps({rank: list(peer) for rank, peer in peers.items()}) + "\n").encode())

    def kill(self) -> None:
        """kill -9, and wait until it has ended."""
        if self.is_alive:
            self.is_alive = False
            os.kill(self.pid, signal.SIGKILL)
            assert self._lines.read() == ""
            self._lines.close()
            self._control.close()


def readable(end: Transport, timeout_s: float = PATIENCE_S) -> bool:
    return bool(select.select([end.fileno()], [], [], timeout_s)[0])


def collect(end: Transport, count: int, others: tuple[Transport, ...] = ()) -> list[Batch]:
    """The next `count` batches, copied, or more that have come with them; `others` are polled meanwhile, which brings
    their backlog on its way."""
    batches: list[Batch] = []
    while len(batches) < count:
        for other in others:
            other.flush()
            assert not other.poll()
        if not readable(end, 0.01 if others else PATIENCE_S):
            assert others, f"{count - len(batches)} of {count} batches have not come"
            continue
        end.flush()
        batches += [copied(batch) for batch in end.poll()]
    return batches


def copied(batch: Batch) -> Batch:
    """It outlives the poll that brought it."""
    names = ("slots", "generations", "iterations", "expert_ids", "expert_weights")
    for name in names:
        setattr(batch, name, getattr(batch, name).copy())
    if batch.payload is not None:
        with torch.inference_mode():
            batch.payload = batch.payload.clone()
    return batch

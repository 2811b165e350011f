"""Who serves, and where experts are computed: one board for the cluster, told to all workers at every change."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np

from amoe.engine.messages import Topology
from amoe.types import Int16Array

NOBODY = -1


class TopologyBoard:
    """The topology in force. Every change has a new version, which goes to all workers that serve.

    Args:
        num_ranks: ranks that there may ever be.
        owners: [num_layers, num_experts, R] where experts are computed, see `Topology.owners`.
        send: takes a message to the worker of a rank; one that is gone must not make it raise.

    Attributes:
        version: of the last change.
        incarnations: by rank; `NOBODY` where nobody serves.
        owners: in force.
        observers: called after every change.
    """

    def __init__(self, num_ranks: int, owners: Int16Array, send: Callable[[int, Topology], None]) -> None:
        self.version = 0
        self.incarnations = [NOBODY] * num_ranks
        self.owners = owners
        self.observers: list[Callable[[Topology], None]] = []
        self._addresses = [""] * num_ranks
        self._send = send
        self._applied = [-1] * num_ranks
        self._changed = asyncio.Event()

    @property
    def present(self) -> list[int]:
        """Ranks that serve."""
        return [rank for rank, incarnation in enumerate(self.incarnations) if incarnation != NOBODY]

    @property
    def topology(self) -> Topology:
        """As workers are told."""
        owners = np.ascontiguousarray(self.owners, "<i2")
        return Topology(
            self.version, list(self.incarnations), list(self._addresses), owners.tobytes(), owners.shape[-1]
        )

    def join(self, workers: dict[int, tuple[int, str]]) -> None:
        """Workers serve from now on: incarnation and address of each, by rank."""
        for rank, (incarnation, address) in workers.items():
            self.incarnations[rank], self._addresses[rank], self._applied[rank] = incarnation, address, -1
        self._tell()

    def leave(self, rank: int) -> None:
        """A worker serves no more."""
        if self.incarnations[rank] != NOBODY:
            self.incarnations[rank], self._addresses[rank] = NOBODY, ""
            self._tell()

    def place(self, owners: Int16Array) -> None:
        """Experts are computed elsewhere from now on: each home changes its routing at once."""
        self.owners = owners
        self._tell()

    def on_applied(self, rank: int, version: int) -> None:
        """A worker has said that a version is in force there."""
        self._applied[rank] = max(self._applied[rank], version)
        self._wake()

    async def wait_applied(self, version: int) -> None:
        """Until every worker that serves has said so of this version, or of a later one."""
        while self.laggards(version):
            await self._changed.wait()

    def laggards(self, version: int) -> list[int]:
        """Ranks of workers that serve, and have not said so yet."""
        return [rank for rank in self.present if self._applied[rank] < version]

    def _tell(self) -> None:
        self.version += 1
        topology = self.topology
        for rank in self.present:
            self._send(rank, topology)
        for observer in self.observers:
            observer(topology)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

"""The cluster of `tests/cluster.py` with its workers on a transport that goes through the kernel: real sockets."""

from __future__ import annotations

import select

from amoe.clock import MonotonicClock
from amoe.cluster.local import ring_bytes_for
from amoe.config import EngineConfig
from amoe.engine.emulated_device import served_shape
from amoe.engine.messages import Unanswered
from amoe.transport.base import Peer, Transport
from amoe.transport.opening import create_fabric, open_transport
from tests.cluster import InprocCluster

_HOST = "127.0.0.1"


class WiredFabric:
    """The ends of all workers of `config`, on its transport."""

    def __init__(self, config: EngineConfig) -> None:
        placement = config.placement
        self._fabric = create_fabric(
            config.transport,
            num_ranks=placement.num_ranks,
            num_homes=len(placement.attention_ranks),
            max_record_bytes=ring_bytes_for(config, served_shape(config)),
        )
        spec = self._fabric.spec_for(_HOST)
        self.ends: list[Transport] = [open_transport(spec, rank) for rank in range(placement.num_workers)]
        peers = {end.rank: Peer(0, end.address) for end in self.ends}
        for end in self.ends:
            end.update(peers)

    def endpoint(self, rank: int) -> Transport:
        return self.ends[rank]

    def close(self) -> None:
        for end in self.ends:
            end.close()
        self._fabric.close()


class WiredCluster(InprocCluster):
    """Workers in this process that hear of each other through the kernel only."""

    # By the clock on the wall, a busy machine may keep one waiting for so long that it says so.
    expected = (*InprocCluster.expected, Unanswered)

    def __init__(self, config: EngineConfig) -> None:
        wires = WiredFabric(config)
        super().__init__(config, fabric=wires, make_clock=MonotonicClock)
        self._poll = select.poll()
        for end in wires.ends:
            self._poll.register(end.fileno(), select.POLLIN)

    def rest(self) -> None:
        """Until something has come, or a timer may have run out."""
        self._poll.poll(1)

"""What a `Topology` says to the core and to the transport of a worker."""

from __future__ import annotations

import numpy as np

from amoe.core.members import NOBODY, Roster
from amoe.engine.messages import Topology
from amoe.transport.base import Peer


def roster_of(topology: Topology, num_experts: int) -> Roster:
    """What a topology says to the core of a worker."""
    owners = np.frombuffer(topology.owners, "<i2").reshape(-1, num_experts, topology.num_replicas)
    return Roster(topology.version, topology.incarnations, owners.astype(np.int16))


def peers_of(topology: Topology) -> dict[int, Peer]:
    """What a topology says to the transport of a worker."""
    places = enumerate(zip(topology.incarnations, topology.addresses, strict=True))
    return {rank: Peer(incarnation, address) for rank, (incarnation, address) in places if incarnation != NOBODY}

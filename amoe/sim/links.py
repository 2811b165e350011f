"""Batches on their way between devices: ports that serialise, latency, and the queue at a popular receiver."""

from __future__ import annotations

from collections.abc import Callable

from amoe.profiles.links import Fabric
from amoe.sim.events import EventQueue
from amoe.types import Batch

HEADER_BYTES = 64  # of a batch on the wire, as in `amoe.transport.wire`


def batch_bytes(batch: Batch, row_bytes: float) -> float:
    """Header, columns and one hidden state per row."""
    slots = batch.slots
    columns = slots.nbytes + batch.generations.nbytes + batch.iterations.nbytes
    pairs = batch.expert_ids.nbytes + batch.expert_weights.nbytes
    return HEADER_BYTES + columns + pairs + len(slots) * row_bytes


class Port:
    """One direction of one device's port: serves one batch after the other."""

    __slots__ = ("_free_at",)

    def __init__(self) -> None:
        self._free_at = 0.0

    def serve(self, now: float, seconds: float) -> float:
        """A batch that takes `seconds` queues now. Returns when it is through."""
        self._free_at = max(self._free_at, now) + seconds
        return self._free_at


class Network:
    """Carries batches between the devices of a `Fabric`; device = rank of its worker.

    A batch passes the sender's port, then the latency, then the receiver's port: it is there when its last byte is in.
    At both ports batches queue in the order in which they come. What a worker sends to itself is there at once.

    Args:
        deliver: called with each batch when it is there.
    """

    def __init__(
        self,
        events: EventQueue,
        fabric: Fabric,
        num_devices: int,
        row_bytes: float,
        deliver: Callable[[Batch], None],
    ) -> None:
        self._events = events
        self._links = (fabric.intra, fabric.inter)
        self._row_bytes = row_bytes
        self._deliver = deliver
        self._node = [device // fabric.devices_per_node for device in range(num_devices)]
        # Ports to the own node, then ports to the network.
        self._egress = tuple([Port() for _ in range(num_devices)] for _ in range(2))
        self._ingress = tuple([Port() for _ in range(num_devices)] for _ in range(2))
        self.num_bytes = 0.0

    def send(self, batch: Batch) -> None:
        """`batch` leaves now."""
        if batch.src == batch.dst:
            self._deliver(batch)
            return
        is_far = self._node[batch.src] != self._node[batch.dst]
        link = self._links[is_far]
        num_bytes = batch_bytes(batch, self._row_bytes)
        self.num_bytes += num_bytes
        seconds = num_bytes / link.bandwidth
        sent = self._egress[is_far][batch.src].serve(self._events.now, seconds)
        self._events.at(sent + link.latency_s, self._arrive, (batch, self._ingress[is_far][batch.dst], seconds))

    def _arrive(self, arrival: tuple[Batch, Port, float]) -> None:
        """The first byte is at the receiver: only now is its place in the queue known."""
        batch, port, seconds = arrival
        self._events.at(port.serve(self._events.now, seconds), self._deliver, batch)
